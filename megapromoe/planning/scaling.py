"""Plans of several numbers of nodes and experts, and of two configurations, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megapromoe.config.options import Config, ConfigError
from megapromoe.number_text import significant
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.planning.machines import GIB
from megapromoe.planning.search import Plan, PlanError, Search, describe

FASTER = 1.02  # a step that is not shorter by this factor is no faster
WORTH = 0.5  # more nodes are worth their price if they add at least this share of their ideal speed


@dataclass(frozen=True)
class Point:
    """The best plan for some nodes and experts; `problem` is why there is none. `experts` is 0 for a dense model."""

    nodes: int
    experts: int
    plan: Plan | None
    problem: str = ""


@dataclass(frozen=True)
class Cost:
    """What a plan costs for a number of images: steps, hours and GPU-hours."""

    steps: int
    hours: float
    gpu_hours: float


def cost_of(plan: Plan, images: int | None) -> Cost:
    """The cost of training on `images` images; None: of all `train.steps`."""
    train = plan.config.train
    steps = train.steps if images is None else -(-images // train.global_batch)
    hours = plan.time.total * steps / 3600
    return Cost(steps, hours, hours * plan.layout.world)


def make_point(config: Config, nodes: int, result: Search | PlanError | ConfigError) -> Point:
    """The point of a search, or of the error that it ended with."""
    experts = config.model.num_experts if config.model.moe_blocks else 0
    if isinstance(result, Search):
        return Point(nodes, experts, result.best)
    return Point(nodes, experts, None, " ".join(str(result).split()))


def efficiency(points: Sequence[Point], of: Point) -> float | None:
    """Images per second and GPU, relative to the fewest nodes that can run the same experts."""
    same = [p for p in points if p.experts == of.experts and p.plan is not None]
    if of.plan is None or not same:
        return None
    first = min(same, key=lambda p: p.nodes).plan
    assert first is not None
    return (of.plan.images_per_second / of.plan.layout.world) / (first.images_per_second / first.layout.world)


def point_lines(points: Sequence[Point], images: int | None) -> Iterator[str]:
    """The table of points, and in sentences where more is worse."""
    yield (
        " nodes   GPUs experts  layout                                                   images x acc."
        "  GiB/GPU   ms/step      hours  GPU-hours    MFU  efficiency"
    )
    for p in points:
        if p.plan is None:
            yield f"{p.nodes:6} {'':6} {p.experts or '-':>7}  {p.problem}"
            continue
        plan, cost = p.plan, cost_of(p.plan, images)
        share = efficiency(points, p)
        words = describe(plan).split(", micro-batch")[0]
        words += "".join(f", {more}" for more in describe(plan).split(", ")[5:])
        yield (
            f"{p.nodes:6} {plan.layout.world:6} {p.experts or '-':>7}  {words:56}"
            f" {plan.layout.micro_batch:6} x {plan.config.train.accumulation:<4}"
            f" {plan.memory.peak / GIB:8.1f} {1e3 * plan.time.total:9.1f} {significant(cost.hours):>10}"
            f" {significant(cost.gpu_hours):>10} {plan.mfu:6.1%} {share or 0:11.0%}"
        )
    yield "efficiency: images per second and GPU, relative to the fewest nodes of the same experts"
    yield from verdicts(points, images)


def verdicts(points: Sequence[Point], images: int | None) -> Iterator[str]:
    """Where more nodes do not shorten a step or are hardly worth it, and what more experts cost."""
    for experts in dict.fromkeys(p.experts for p in points):
        same = sorted((p for p in points if p.experts == experts and p.plan), key=lambda p: p.nodes)
        name = f"{experts} experts: " if len({p.experts for p in points}) > 1 else ""
        for before, after in pairwise(same):
            yield from _step_up(name, before, after, images)
    for nodes in dict.fromkeys(p.nodes for p in points):
        same = sorted((p for p in points if p.nodes == nodes and p.plan), key=lambda p: p.experts)
        if len(same) > 1 and same[0].plan and same[-1].plan:
            ratio = same[-1].plan.time.total / same[0].plan.time.total
            yield (
                f"{_nodes(nodes)}: {same[-1].experts} experts take {ratio:.2f} times the hours of {same[0].experts},"
                f" at {same[-1].plan.memory.peak / GIB:.1f} instead of {same[0].plan.memory.peak / GIB:.1f} GiB"
            )


def _step_up(name: str, before: Point, after: Point, images: int | None) -> Iterator[str]:
    assert before.plan is not None and after.plan is not None
    if after.nodes == before.nodes:
        return
    speed, ideal = before.plan.time.total / after.plan.time.total, after.nodes / before.nodes
    costs = [cost_of(p.plan, images) for p in (before, after) if p.plan]
    figures = (
        f"{significant(costs[1].hours)} instead of {significant(costs[0].hours)} hours,"
        f" {significant(costs[1].gpu_hours)} instead of {significant(costs[0].gpu_hours)} GPU-hours"
    )
    if speed < FASTER:
        word = "slower" if speed < 1 / FASTER else "no faster"
        yield f"{name}{_nodes(after.nodes)} are {word} than {_nodes(before.nodes)}: more is worse ({figures})"
    elif (speed - 1) / (ideal - 1) < WORTH:
        yield (
            f"{name}{_nodes(after.nodes)} are {speed:.2f} times as fast as {_nodes(before.nodes)}, less than half of"
            f" what the added nodes could give ({figures})"
        )


def _nodes(number: int) -> str:
    return f"{number} node{'s' * (number != 1)}"


def compare_lines(plans: Sequence[tuple[str, Plan]], images: int | None) -> Iterator[str]:
    """Two best plans side by side, with the ratio of the second to the first."""
    (name_a, a), (name_b, b) = plans
    rows: list[tuple[str, float, float]] = []
    for label, of in (
        ("parameters, M", lambda p: parameters(p.config.model).total / 1e6),
        ("active parameters, M", lambda p: parameters(p.config.model).active / 1e6),
        ("GFLOPs of an image, forward", lambda p: flops_per_image(p.config.model).forward / 1e9),
        ("images of a step", lambda p: p.config.train.global_batch),
        ("GiB of the fullest GPU", lambda p: p.memory.peak / GIB),
        ("ms of a step", lambda p: 1e3 * p.time.total),
        ("images per second", lambda p: p.images_per_second),
        ("MFU, %", lambda p: 100 * p.mfu),
        ("steps", lambda p: cost_of(p, images).steps),
        ("hours", lambda p: cost_of(p, images).hours),
        ("GPU-hours", lambda p: cost_of(p, images).gpu_hours),
    ):
        rows.append((label, float(of(a)), float(of(b))))
    width = max(14, len(name_a), len(name_b))
    yield f"  {'':28} {name_a:>{width}} {name_b:>{width}}  B over A"
    for label, first, second in rows:
        ratio = f"{second / first:8.2f}" if first else ""
        yield f"  {label:28} {significant(first):>{width}} {significant(second):>{width}}  {ratio}"
    for name, plan in plans:
        yield f"  {name}: {describe(plan)}"
