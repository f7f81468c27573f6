"""Searches all layouts of a model on a machine for those that fit in memory and the best of them."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from megapromoe.config.deepspeed_file import find_ds_configs
from megapromoe.config.layout import Layout
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.resolve import check
from megapromoe.errors import UserError
from megapromoe.planning.machines import GIB, Assumptions, Machine
from megapromoe.planning.memory import Budget, budget
from megapromoe.planning.roofline import StepTime, nodes_of, step_time, utilization
from megapromoe.planning.zero import scatters_gradients, zero_of

CLOSE = 1.1  # estimates within this factor count as equal, and the simpler layout is chosen
# Estimates are least accurate for the network between nodes: experts are spread over nodes only if that is faster by
# this factor, or if nothing else fits.
ACROSS = 1.25
ALIKE = 1.02  # layouts within this factor in time and in memory are listed as one line


class PlanError(UserError):
    """No layout can be planned. The message gives the reason and a remedy."""


@dataclass(frozen=True)
class Plan:
    """A layout with its estimated memory and time."""

    config: Config
    layout: Layout
    memory: Budget
    time: StepTime
    mfu: float
    ep_nodes: int = 1  # number of nodes over which an expert-parallel group is spread

    @property
    def stage(self) -> int:
        return zero_of(self.config).stage

    @property
    def images_per_second(self) -> float:
        return self.config.train.global_batch / self.time.total

    @property
    def hours(self) -> float:
        """Hours of the whole training."""
        return self.time.total * self.config.train.steps / 3600

    @property
    def complexity(self) -> tuple:
        """Sort key that puts simple layouts first, to decide ties; layouts with ep over several nodes come last."""
        p = self.config.parallel
        layout = self.layout
        first = (self.ep_nodes, layout.tp > 1, p.recompute != "none", p.shard_ranks > 0, self.stage >= 2)
        return *first, layout.tp, layout.ep, self.stage


@dataclass(frozen=True)
class Search:
    """The result of a search: plans that fit, the best first; plans that do not; the number of invalid combinations."""

    fitting: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    impossible: int
    limit: float
    accumulation_changed: bool = False

    @property
    def best(self) -> Plan:
        return self.fitting[0]


def search(
    config: Config, world: int, machine: Machine, assume: Assumptions, fixed: frozenset[str] = frozenset()
) -> Search:
    """Tries all (tp, ep, expert_tp, shard_ranks, ZeRO, recompute) over `world` ranks.

    More accumulation is tried only if nothing else fits.

    `fixed` settings, such as "parallel.tp", keep the values of the config. So does accumulation if possible, because
    with `model.batch_scope=global` it changes the results of training.

    Raises PlanError if the batch cannot be divided, or nothing fits; ConfigError where something else is wrong.
    """
    limit = machine.memory * assume.usable
    configured = config.train.accumulation
    plans, impossible = _plans(config, world, machine, assume, fixed)
    if not plans:
        raise PlanError(_cannot_divide(config, world, machine, fixed))
    fitting = [p for p in plans if p.memory.peak <= limit]
    free = not fitting and "train.accumulation" not in fixed
    for accumulation in _more_accumulation(config) if free else ():
        more, _ = _plans(_accumulating(config, accumulation), world, machine, assume, fixed)
        plans += more
        if fitting := [p for p in more if p.memory.peak <= limit]:
            break
    if not fitting:
        raise PlanError(_too_large(plans, world, machine, assume))
    fastest = min(p.time.total for p in fitting)
    inside = min((p.time.total for p in fitting if p.ep_nodes == 1), default=math.inf)
    stay = inside <= fastest * ACROSS
    bound = CLOSE * (inside if stay else fastest)
    close: list[Plan] = []
    others: list[Plan] = []
    for plan in fitting:
        (close if plan.time.total <= bound and not (stay and plan.ep_nodes > 1) else others).append(plan)
    close.sort(key=lambda p: (p.complexity, p.time.total))
    others.sort(key=lambda p: p.time.total)
    fitting = [*close, *others]
    large = sorted((p for p in plans if p.memory.peak > limit), key=lambda p: p.time.total)
    changed = fitting[0].config.train.accumulation != configured
    return Search(tuple(fitting), tuple(large), impossible, limit, changed)


def _plans(
    config: Config, world: int, machine: Machine, assume: Assumptions, fixed: frozenset[str]
) -> tuple[list[Plan], int]:
    plans, impossible = [], 0
    for candidate in candidates(config, world, machine, fixed):
        try:
            check(candidate, world)
        except ConfigError:
            impossible += 1
            continue
        layout = candidate.layout(world)
        time = step_time(candidate, layout, machine, assume)
        memory = budget(candidate, layout, assume.imbalance)
        mfu = utilization(candidate, layout, machine, time.total)
        plans.append(Plan(candidate, layout, memory, time, mfu, nodes_of(layout.ep, layout.etp, machine)))
    return plans, impossible


def candidates(config: Config, world: int, machine: Machine, fixed: frozenset[str] = frozenset()) -> Iterator[Config]:
    """All reasonable combinations, unchecked: tp within a node, ep up to the number of experts.

    States are divided over all ranks, or over those that NVLink joins.
    """
    experts = config.model.num_experts if config.model.moe_blocks else 1
    policies = ("none", "moe", "blocks", "all") if config.model.moe_blocks else ("none", "blocks", "all")
    choices: dict[str, Sequence[Any]] = {  # each value has the type of its option
        "parallel.tp": _divisors(world, machine.gpus_per_node),
        "parallel.ep": _divisors(world, experts),
        "parallel.expert_tp": (False, True) if config.model.moe_blocks else (False,),
        "parallel.recompute": policies,
        "parallel.shard_ranks": (0, machine.nvlink_gpus) if world > machine.nvlink_gpus else (0,),
        "train.deepspeed": stages(config),
    }
    fixed_values = asdict(config)
    for key in choices.keys() & fixed:
        section, _, name = key.partition(".")
        choices[key] = (fixed_values[section][name],)
    for tp, ep, expert_tp, recompute, shard_ranks, deepspeed in product(*choices.values()):
        if expert_tp and tp == 1 and "parallel.expert_tp" not in fixed:  # the same as without
            continue
        parallel = replace(
            config.parallel, tp=tp, ep=ep, expert_tp=expert_tp, recompute=recompute, shard_ranks=shard_ranks
        )
        candidate = replace(config, parallel=parallel, train=replace(config.train, deepspeed=deepspeed))
        if not shard_ranks or "parallel.shard_ranks" in fixed or scatters_gradients(candidate):
            yield candidate


def stages(config: Config) -> tuple[str, ...]:
    """The DeepSpeed files to try: the package's files of the same data type; or only the user's own file."""
    name = config.train.deepspeed
    family = re.fullmatch(r"(bf16|fp32)_zero\d", name)
    if not family:
        return (name,)
    return tuple(sorted(p.stem for p in find_ds_configs().glob(f"{family[1]}_zero?.json")))


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _accumulating(config: Config, accumulation: int) -> Config:
    return replace(config, train=replace(config.train, accumulation=accumulation))


def _more_accumulation(config: Config) -> list[int]:
    """Larger multiples of the config's accumulation; those that leave a rank without an image are refused later."""
    accumulation = config.train.accumulation
    return [accumulation * n for n in _divisors(config.train.global_batch, config.train.global_batch) if n > 1]


def _cannot_divide(config: Config, world: int, machine: Machine, fixed: frozenset[str]) -> str:
    """Why no layout divides evenly. Raises ConfigError if the reason is not the batch."""
    accumulation, batch = config.train.accumulation, config.train.global_batch
    tried = list(candidates(config, world, machine, fixed))
    even = [c.parallel.tp for c in tried if not (config.model.heads % c.parallel.tp or world % c.parallel.tp)]
    fewest = world // max(even, default=1)
    unit = fewest * accumulation
    if even and batch % unit:
        parts = f"in {accumulation} micro-batch{'es' * (accumulation > 1)}"
        largest = world // min(even) * accumulation
        if largest == unit:
            which = f"at least {fewest} take different images, {parts}, so"
        else:  # the smaller tp is proposed first, because it is simpler and usually faster
            which = (
                f"{world // min(even)} take different images at tp {min(even)}, {parts}: a multiple of {largest},"
                f" nearest: {_near(batch, largest)}; or {fewest} do at tp {max(even)}, which splits each layer over"
                f" {max(even)} GPUs: then"
            )
        return (
            f"train.global_batch = {batch}: of {world} GPUs {which} it must be a multiple of {unit}; nearest:"
            f" {_near(batch, unit)} (--global-batch)"
        )
    check(tried[0], world)
    return f"no layout of {world} GPUs divides evenly; try another number of nodes"


def _near(batch: int, unit: int) -> str:
    """The multiples of `unit` next to `batch`."""
    return ", ".join(str(n) for n in (batch // unit * unit, (batch // unit + 1) * unit) if n)


def _too_large(plans: list[Plan], world: int, machine: Machine, assume: Assumptions) -> str:
    smallest = min(plans, key=lambda p: p.memory.peak)
    m, t = smallest.memory, smallest.config
    largest = max(Budget.LINES, key=lambda line: getattr(m, line))
    remedies = []
    if largest in ("parameters", "gradients", "optimizer", "ema"):
        remedies.append("take more nodes, over which the states are divided")
    if largest in ("activations", "transient", "dispatch", "imbalance") and smallest.layout.micro_batch > 1:
        remedies.append("take more nodes or raise train.accumulation, for smaller micro-batches")
    if largest == "replicas":
        remedies.append("set parallel.replicas to fewer copies of experts")
    if largest == "buckets":
        remedies.append("set a smaller zero_optimization.reduce_bucket_size in a DeepSpeed file of your own")
    if smallest.stage != 3 and stages(t) == (t.train.deepspeed,):
        remedies.append("set train.deepspeed=bf16_zero3, which divides the parameters too")
    remedies.append("take fewer experts or GPUs with more memory")
    return (
        f"no layout fits {machine.memory * assume.usable / GIB:.1f} GiB of each {machine.name}"
        f" ({assume.usable:.0%} of {machine.memory / GIB:.1f}): the smallest of {len(plans)} on {world} GPUs,"
        f" {describe(smallest)}, needs {m.peak / GIB:.1f} GiB, {getattr(m, largest) / GIB:.1f} of them {largest};"
        f" {', or '.join(remedies)}"
    )


def fold(plans: Sequence[Plan]) -> list[tuple[Plan, int]]:
    """The plans without near-duplicates, in order: the simplest of each group of equivalent plans, and their number.

    Plans are equivalent if their time and memory both differ by less than `ALIKE` from the first of the group.
    """
    groups: list[tuple[float, float, list[Plan]]] = []
    for plan in plans:
        time, peak = plan.time.total, plan.memory.peak
        for first_time, first_peak, group in groups:
            times, peaks = (time, first_time), (peak, first_peak)
            if max(times) < ALIKE * min(times) and max(peaks) < ALIKE * min(peaks):
                group.append(plan)
                break
        else:
            groups.append((time, peak, [plan]))
    return [(min(group, key=lambda plan: plan.complexity), len(group)) for _, _, group in groups]


def describe(plan: Plan) -> str:
    """A layout in a few words."""
    p, train = plan.config.parallel, plan.config.train
    words = [f"tp {p.tp}", f"ep {p.ep}", f"dp {plan.layout.dp}", train.deepspeed]
    words += [f"micro-batch {plan.layout.micro_batch} x {train.accumulation}"]
    words += [f"states over {p.shard_ranks} ranks"] * bool(p.shard_ranks)
    words += ["experts split over tp"] * p.expert_tp + [f"recomputing {p.recompute}"] * (p.recompute != "none")
    return ", ".join(words)
