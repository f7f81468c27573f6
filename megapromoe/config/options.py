"""The options of a run: every section and key, with its default, its meaning and the values it may have.

The classes are frozen and typed, and the module imports no torch. The large sections have modules of their own.
`resolve.py` reads the options, `rules.py` holds the rules between them. The rules on the layout over ranks are in this
module because `Config.layout` needs them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapromoe.config import extensions
from megapromoe.config.data_options import DataConfig
from megapromoe.config.expert_placement import AUTO, CONTIGUOUS, Placements, is_file, read_placements
from megapromoe.config.layout import Layout
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.reader import (
    ONE_UP,
    POSITIVE,
    ZERO_UP,
    NumberOrAuto,
    nearest_divisors,
    nearest_multiples,
    option,
)
from megapromoe.config.train_options import TrainConfig
from megapromoe.errors import ExitCode, Violations

SAMPLING_METHODS = ("euler", "heun", "ddpm", "ddim", "unipc", "dpm_solver++")


class ConfigError(Violations):
    """A configuration that cannot run. `violations` lists every reason, and the message contains all of them."""

    subject = "the configuration"
    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # every rank reads the same options


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over the ranks."""

    tp: int = option(
        1, "tensor-parallel size: number of ranks over which attention heads and MLP widths are split", within=ONE_UP
    )
    ep: int = option(
        1, "expert-parallel size: number of ranks over which the routed experts are distributed", within=ONE_UP
    )
    expert_tp: bool = option(False, "also split the width of each routed expert over the tp ranks")
    recompute: str = option(
        "none",
        "activations that the backward pass recomputes to save memory: none, those of MoE layers (moe), all but the"
        " routers' (blocks), or all",
        ("none", "moe", "blocks", "all"),
    )
    placement: str = option(
        CONTIGUOUS,
        "which ep rank has which routed experts: consecutive ones (contiguous); those that the load of the run so far"
        " suggests, chosen at each start (auto); or those of a file of `megapromoe routing place` (docs/train.md)",
        (CONTIGUOUS, AUTO),
        accepts=is_file,
        form="FILE.yaml",
    )
    shard_ranks: int = option(
        0,
        "number of consecutive ranks, such as those of a node, over which ZeRO stages 1 and 2 divide optimizer states;"
        " gradients are then summed over these ranks and after that between them and the others; 0: over all ranks",
        within=ZERO_UP,
    )
    replicas: int | str = option(
        0,
        "copies of experts of other ranks that an ep rank holds in each block at most, to divide the rows of popular"
        " experts (docs/train.md); auto: as few as give the fullest rank at most 1.05 times the mean rows. With"
        " parallel.placement=auto; a file lists its copies itself",
        within=ZERO_UP,
        kind=NumberOrAuto,
    )


@dataclass(frozen=True)
class DiffusionConfig:
    """The training objective: rectified flow or DDPM."""

    objective: str = option("rf", "training objective: rectified flow (rf) or DDPM", ("rf", "ddpm"))
    time: str = option(
        "logit_normal", "rf: distribution from which the training time is sampled", ("logit_normal", "mode", "uniform")
    )
    logit_mean: float = option(0.0, "rf: mean of the logit of the time", within="(-inf, inf)")
    logit_std: float = option(1.0, "rf: standard deviation of the logit of the time", within=POSITIVE)
    # Above 2 / (pi - 2) or below -1 the map from uniform to mode time is not monotonic (arXiv 2403.03206, 3.1).
    mode_scale: float = option(1.29, "rf: scale of mode sampling; larger: more middle times", within="[-1, 1.7519]")
    shift: float = option(1.0, "rf: factor that shifts the times towards noise; 1: no shift", within=POSITIVE)
    shift_base: int = option(
        0,
        "rf: side of the latents at which the times need no shift; diffusion.shift is multiplied by the square root of"
        " how many times more pixels latents of model.input_size have; 0: only diffusion.shift",
        within=ZERO_UP,
    )


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled."""

    method: str = option(
        "euler",
        "sampling method, or one's own, see docs/library.md; unipc and dpm_solver++ need diffusers",
        SAMPLING_METHODS,
        accepts=extensions.SAMPLER.accepts,
    )
    steps: int = option(250, "number of sampling steps", within=ONE_UP)
    guidance: float = option(1.5, "classifier-free guidance scale; 1: no guidance", within=ZERO_UP)
    guidance_low: float = option(
        0.0, "lowest time at which guidance is applied; 0 is the image, 1 the noise", within="[0, 1]"
    )
    guidance_high: float = option(
        1.0, "highest time at which guidance is applied; 0 is the image, 1 the noise", within="[0, 1]"
    )
    batch: int = option(64, "number of images that a rank samples in one batch", within=ONE_UP)
    seed: int = option(0, "seed of the noise of sampled images", within=ZERO_UP)


@dataclass(frozen=True)
class Config:
    """All options of a run; made by `resolve`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()

    @property
    def time_shift(self) -> float:
        """The shift of times in training and sampling: `diffusion.shift`, and sqrt(m / n) for m pixels instead of n.

        Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2.
        """
        base = self.diffusion.shift_base
        return self.diffusion.shift * (math.sqrt(self.model.input_size**2 / base**2) if base else 1.0)

    def layout(self, world: int) -> Layout:
        """The sizes of the process groups over `world` ranks. Raises ConfigError where a size does not divide."""
        if problems := sentences(self, world_rules(self, world)):
            raise ConfigError(problems)
        tp, ep = self.parallel.tp, self.parallel.ep
        etp = tp if self.parallel.expert_tp else 1
        dp = world // tp
        micro_batch = self.train.global_batch // (dp * self.train.accumulation)
        placements = self.placements_in_file().values()
        slots = tuple(placement.slots for placement in placements)
        replicas = tuple((placement.replica_slots, placement.copies) for placement in placements)
        if not any(copies for copies, _ in replicas):
            replicas = ()
        if isinstance(self.parallel.replicas, int) and self.parallel.replicas and ep > 1:
            most = min(self.parallel.replicas, self.model.num_experts - self.model.num_experts // ep)
            replicas = ((most, most * ep),) * len(self.model.moe_blocks)
        shards = self.parallel.shard_ranks
        return Layout(world, tp, ep, dp, world // (ep * etp), etp, micro_batch, slots, shards, replicas)

    @property
    def copies_in_words(self) -> str:
        """The option that asks for copies of experts."""
        if self.parallel.replicas:
            return f"parallel.replicas = {self.parallel.replicas}"
        return f"replicas in the file parallel.placement = {self.parallel.placement}"

    @property
    def may_have_replicas(self) -> bool:
        """Whether ranks can have copies of experts; also false for a file of placements that cannot be read."""
        if self.parallel.ep == 1:
            return False
        return bool(self.parallel.replicas) or any(p.replicas for p in _read_placements(self)[0].values())

    def placements_in_file(self) -> Placements:
        """The placements in the file `parallel.placement`; empty if it is none. Raises ConfigError for a wrong file."""
        placements, problems = _read_placements(self)
        if problems:
            raise ConfigError(sentences(self, [(PLACEMENT_KEYS, problem) for problem in problems]))
        return placements


def ratio_of(width: int, size: int) -> float:
    """The ratio for which int(size * ratio) is `width`. The plain quotient may round to a smaller width."""
    ratio = width / size
    return ratio if int(size * ratio) == width else math.nextafter(ratio, math.inf)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts and lists, section by section."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        for section, values in asdict(config).items()
    }


# ---- rules, and their sentences

# The dotted names of the fields concerned, the violating field first; the requirement, with the remedy.
Rule = tuple[tuple[str, ...], str]


def sentences(config: Config, broken: Iterable[Rule], refused: Iterable[str] = ()) -> list[str]:
    """A sentence for each broken rule, with the violating value; rules that concern a refused field are left out."""
    refused = set(refused)
    return [f"{keys[0]} = {_plain_value(config, keys[0])!r}: {rule}" for keys, rule in broken if not refused & {*keys}]


def _plain_value(config: Config, key: str) -> Any:
    """The value of one option as `to_dict` gives it, without a copy of all options: plans check many layouts."""
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return list(value) if isinstance(value, tuple) else value


REPLICAS_KEYS = ("parallel.replicas", "parallel.placement")
PLACEMENT_KEYS = ("parallel.placement", "parallel.ep", "model.num_experts", "model.router", "model.moe_every")


def _read_placements(config: Config) -> tuple[Placements, list[str]]:
    """The placements in the file `parallel.placement`, none if it is no file, and what is wrong with them."""
    if not is_file(config.parallel.placement):
        return {}, []
    path, model = Path(config.parallel.placement), config.model
    if not model.moe_blocks:
        return {}, [f"must be {CONTIGUOUS} for a model without routed experts"]
    return read_placements(path, model.moe_blocks, model.num_experts, config.parallel.ep)


def world_rules(config: Config, world: int) -> Iterator[Rule]:
    """The broken rules on the layout over `world` ranks."""
    yield from ((PLACEMENT_KEYS, problem) for problem in _read_placements(config)[1])
    if config.model.capacity_factor and config.may_have_replicas:
        rule = (
            f"must be 0 with copies of experts ({config.copies_in_words}): a capacity is a fixed number of rows of each"
            " expert, and copies divide what each step brings"
        )
        yield ("model.capacity_factor", *REPLICAS_KEYS), rule
    if config.train.compile and config.may_have_replicas:
        rule = (
            f"must be false with copies of experts ({config.copies_in_words}): their weights are messages within what"
            " is compiled as one graph; train without compilation or without copies"
        )
        yield ("train.compile", *REPLICAS_KEYS), rule
    tp, ep, train = config.parallel.tp, config.parallel.ep, config.train
    if world < 1:
        yield ("parallel.tp",), f"needs at least 1 rank, not {world}"
        return
    if world % tp:
        yield ("parallel.tp",), f"must divide the {world} ranks; nearest: {nearest_divisors(tp, world)}"
    if world % ep:
        yield ("parallel.ep",), f"must divide the {world} ranks; nearest: {nearest_divisors(ep, world)}"
    elif config.parallel.expert_tp and world % tp == 0 and world // tp % ep:
        near = nearest_divisors(ep, world // tp)
        rule = f"must divide the {world} ranks / tp = {world // tp} with parallel.expert_tp; nearest: {near}"
        yield ("parallel.ep", "parallel.tp", "parallel.expert_tp"), rule
    yield from _shard_rules(config, world)
    dp = world // tp
    if world % tp == 0 and train.global_batch % (dp * train.accumulation):
        unit = dp * train.accumulation
        near = nearest_multiples(train.global_batch, unit)
        rule = f"must be a multiple of {dp} data ranks * {train.accumulation} micro-batches; nearest: {near}"
        yield ("train.global_batch", "train.accumulation", "parallel.tp"), rule
    elif world % tp == 0:
        yield from _stratum_rules(config, train.global_batch // (dp * train.accumulation))


def _shard_rules(config: Config, world: int) -> Iterator[Rule]:
    """The broken rule on the ranks over which optimizer states are divided."""
    p, ranks = config.parallel, config.parallel.shard_ranks
    experts = p.ep * (p.tp if p.expert_tp else 1)

    def divides(n: int) -> bool:
        return world % n == 0 and n % p.tp == 0 and (n <= experts or n % experts == 0)

    if ranks and not divides(ranks):
        valid = [n for n in range(1, world + 1) if divides(n)]
        remedy = f"use {' or '.join(map(str, valid))}, or 0 for all ranks" if valid else "use 0, for all ranks"
        of_experts = f", and be a multiple of the {experts} ranks that hold all experts or at most as many"
        rule = f"must divide the {world} ranks and be a multiple of tp = {p.tp}{of_experts if experts > 1 else ''}"
        yield ("parallel.shard_ranks", "parallel.tp", "parallel.ep", "parallel.expert_tp"), f"{rule}; {remedy}"


def _stratum_rules(config: Config, micro_batch: int) -> Iterator[Rule]:
    """The broken rule on the strata of dropped conditions in micro-batches of `micro_batch` images."""
    stratum, rate = config.data.condition_dropout_stratum, config.data.condition_dropout
    if not stratum or micro_batch % stratum == 0:
        return
    divisors = [n for n in range(1, micro_batch + 1) if micro_batch % n == 0]
    if fitting := [n for n in divisors if config.data.drops_whole_numbers(n)]:
        remedy = f"use {' or '.join(map(str, fitting))}, or 0 for independent dropout"
    elif micro_batch > 1:
        dropped = min(max(round(micro_batch * rate), 1), micro_batch - 1)
        remedy = (
            f"use {micro_batch} with data.condition_dropout={dropped / micro_batch!r}, or 0 for independent dropout"
        )
    else:
        remedy = "use 0 for independent dropout, or a larger train.global_batch"
    fields = ("data.condition_dropout_stratum", "train.global_batch", "train.accumulation", "parallel.tp")
    yield fields, f"must divide the micro-batch of a rank, {micro_batch} images; {remedy}"
