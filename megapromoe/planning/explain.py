"""Text of a plan: the table of layouts, memory and traffic of the best one, why it is best, and the effect of EP."""

from collections.abc import Callable, Iterator, Sequence

from megapromoe.config.options import Config
from megapromoe.number_text import significant
from megapromoe.planning.machines import GIB, Assumptions, Machine
from megapromoe.planning.memory import Budget, placement_in_words
from megapromoe.planning.roofline import collective_time
from megapromoe.planning.search import ACROSS, ALIKE, CLOSE, Plan, Search, describe
from megapromoe.planning.traffic import Collective, collectives, expected_batch, routed_rows

HINTS = {
    "products": "matrix products; faster or more GPUs would help",
    "attention": "attention",
    "elementwise": "memory traffic between kernels, not arithmetic; fusing kernels would help",
    "host": "kernel launches on the host, since each kernel is short; larger micro-batches or fewer GPUs would help",
    "layers": "communication within layers",
    "gradients": "communication of gradients or parameters that is not overlapped",
    "update": "the optimizer update: gathering parameters, AdamW and the averages",
}


def table(plans: Sequence[tuple[Plan, int]]) -> Iterator[str]:
    """Lines of a table of plans, as returned by `search.fold`: each with the number of equivalent layouts."""
    divided = any(p.config.parallel.shard_ranks for p, _ in plans)
    yield (
        f" #   tp  ep   dp  DeepSpeed   {'states ' * divided}split recompute  images x acc.  GiB/GPU   ms/step  "
        " images/s    MFU  exposed  alike"
    )
    for number, (p, count) in enumerate(plans, start=1):
        parallel, share = p.config.parallel, p.time.exposed / p.time.total
        split = f"1/{p.layout.etp}" if p.layout.etp > 1 else "-"
        rate, accumulation = p.images_per_second, p.config.train.accumulation
        alike = f"+{count - 1}" if count > 1 else ""
        states = f"{f'1/{p.layout.shard_ranks}' if p.layout.shard_ranks else '-':7}" if divided else ""
        line = (
            f"{number:2} {p.layout.tp:4} {p.layout.ep:3} {p.layout.dp:4}  {p.config.train.deepspeed:11}"
            f" {states}{split:5}"
            f" {parallel.recompute:9} {p.layout.micro_batch:7} x {accumulation:<4}"
            f" {p.memory.peak / GIB:8.1f} {1e3 * p.time.total:9.1f} {significant(rate):>10} {p.mfu:6.1%}"
            f" {share:8.1%} {alike:>6}"
        )
        yield line.rstrip()
    if divided:
        yield "states: of how many ranks each has the optimizer states, parallel.shard_ranks; -: of all"
    if any(count > 1 for _, count in plans):
        yield f"alike: number of other layouts within {ALIKE - 1:.0%} in time and memory; the simplest is listed"


def memory_lines(plan: Plan) -> Iterator[str]:
    """Lines with the memory of a plan on the fullest GPU, in GiB."""
    m = plan.memory
    yield "memory of the fullest GPU, GiB: " + ", ".join(
        f"{line} {getattr(m, line) / GIB:.2f}" for line in Budget.LINES if line != "replicas" or m.replicas
    )
    if plan.layout.replicas:
        most = max(slots for slots, _ in plan.layout.replicas)
        yield f"  replicas: up to {most} copies of experts of other ranks in a block, and their gradients"
    if m.host:
        yield f"  in host memory, for each GPU: {m.host / GIB:.2f} GiB (optimizer and averages)"
    if placement := placement_in_words(plan.config, plan.layout.world):
        yield f"  placement of experts by {placement}"


def traffic_lines(plan: Plan, machine: Machine, assume: Assumptions) -> Iterator[str]:
    """Lines with the collectives of one step, grouped by purpose, the longest first."""
    grouped: dict[tuple, list[Collective]] = {}
    for c in collectives(plan.config, plan.layout):
        grouped.setdefault((c.what, c.op, c.over, c.size), []).append(c)
    lines = []
    for (what, op, over, size), same in grouped.items():
        seconds = sum(collective_time(c, plan.config, plan.layout, machine, assume) for c in same)
        calls, wire = sum(c.count for c in same), sum(c.wire for c in same)
        lines.append(
            (seconds, f"  {what:34} {op:14} {over:>12} {size:5} {calls:6} {wire / 1e6:12,.2f} {1e3 * seconds:8.2f}")
        )
    yield "traffic of one step"
    yield f"  {'what':34} {'collective':14} {'group':>12} {'ranks':>5} {'calls':>6} {'MB sent/GPU':>12} {'ms':>8}"
    yield from (line for _, line in sorted(lines, reverse=True))


def reasons(search: Search, machine: Machine) -> Iterator[str]:
    """Why the best plan was chosen: for each option, a comparison with the fastest plan that has another value."""
    best = search.best
    parallel = best.config.parallel
    yield f"tp {parallel.tp}" + _against(search, lambda p: f"tp {p.layout.tp}")
    if best.config.model.moe_blocks:
        yield f"ep {parallel.ep}" + _against(search, lambda p: f"ep {p.layout.ep}")
    yield best.config.train.deepspeed + _against(search, lambda p: p.config.train.deepspeed)
    yield f"recompute {parallel.recompute}" + _against(search, lambda p: f"recompute {p.config.parallel.recompute}")
    if any(_states(p) != _states(best) for p in (*search.fitting, *search.too_large)):
        yield _states(best) + _against(search, _states)
    yield limits(best)
    if best.ep_nodes > 1:
        yield _across_nodes(search, machine)
    if search.accumulation_changed:
        changed = "batch statistics are computed over smaller batches, which changes the results"
        scope = best.config.model.batch_scope == "global" and best.config.model.moe_blocks
        yield (
            f"train.accumulation={best.config.train.accumulation}: no layout fits with fewer micro-batches;"
            f" {changed if scope else 'the results stay the same'}"
        )


def _states(plan: Plan) -> str:
    """Over which ranks ZeRO divides optimizer states."""
    return f"states over {plan.config.parallel.shard_ranks or 'all'} ranks"


def _against(search: Search, choice: Callable[[Plan], str]) -> str:
    """Compares the best plan with the fastest one with another choice: times, memory, and the deciding rule."""
    best = search.best
    rivals = [p for p in search.fitting if choice(p) != choice(best)]
    # Options other than ep are compared at the same use of the network, if possible.
    if not choice(best).startswith("ep "):
        rivals = [p for p in rivals if p.ep_nodes <= best.ep_nodes] or rivals
    if not rivals:
        larger = [p for p in search.too_large if choice(p) != choice(best)]
        if not larger:
            return ": no other choice can run"
        smallest = min(larger, key=lambda p: p.memory.peak)
        return f": no other choice fits; the smallest, {describe(smallest)}, needs {smallest.memory.peak / GIB:.1f} GiB"
    rival = min(rivals, key=lambda p: p.time.total)
    change = rival.time.total / best.time.total - 1
    if rival.ep_nodes > best.ep_nodes and change < 0:
        verdict = (
            f"it spreads experts over {rival.ep_nodes} nodes, which is chosen only if it is {ACROSS - 1:.0%} faster"
        )
    elif change < CLOSE - 1 and rival.complexity > best.complexity:
        verdict = (
            f"a difference below {CLOSE - 1:.0%} is within the error of the estimates, so the simpler layout is chosen"
        )
    else:
        verdict = f"{change:.0%} faster"
    return f", not {choice(rival)}{_besides(best, rival, choice(rival))}: {_figures(best, rival)}; {verdict}"


def _figures(best: Plan, rival: Plan) -> str:
    times = f"{1e3 * best.time.total:.1f} against {1e3 * rival.time.total:.1f} ms a step"
    return f"{times}, {best.memory.peak / GIB:.1f} against {rival.memory.peak / GIB:.1f} GiB"


def _besides(best: Plan, rival: Plan, choice: str) -> str:
    """The other options in which a rival differs from the best plan."""
    recompute = rival.config.parallel.recompute
    names = (
        (f"tp {rival.layout.tp}", rival.layout.tp != best.layout.tp),
        (f"ep {rival.layout.ep}", rival.layout.ep != best.layout.ep),
        ("experts split over tp", rival.layout.etp > 1 and best.layout.etp == 1),
        (rival.config.train.deepspeed, rival.config.train.deepspeed != best.config.train.deepspeed),
        (f"recompute {recompute}", recompute != best.config.parallel.recompute),
        (_states(rival), _states(rival) != _states(best)),
    )
    words = [name for name, differs in names if differs and name != choice]
    return f" (with {', '.join(words)})" if words else ""


def _across_nodes(search: Search, machine: Machine) -> str:
    """Why the best plan sends rows of experts over the network."""
    best = search.best
    start = f"ep {best.layout.ep} spans {best.ep_nodes} nodes: rows cross the network ({machine.network / 1e9:.0f} GB/s"
    inside = [p for p in search.fitting if p.ep_nodes == 1]
    if not inside:
        return f"{start} a GPU), because no layout with ep inside a node fits"
    rival = min(inside, key=lambda p: p.time.total)
    return f"{start} a GPU), because it is faster than ep {rival.layout.ep} inside a node: {_figures(best, rival)}"


def limits(plan: Plan) -> str:
    """The largest share of the time of a step, with all shares."""
    t = plan.time
    if t.host > t.device:
        parts = {"host": t.host}
    else:
        parts = {"products": t.products, "attention": t.attention, "elementwise": t.elementwise}
    if not t.asynchronous:
        parts = {"products": t.products, "attention": t.attention, "elementwise": t.elementwise, "host": t.host}
    parts |= {"layers": t.layers_traffic, "gradients": t.exposed_gradients, "update": t.update}
    order = sorted(parts, key=lambda name: parts[name], reverse=True)
    shares = ", ".join(f"{name} {parts[name] / t.total:.0%}" for name in order)
    return f"limited by {HINTS[order[0]]} ({shares}; {1e3 * t.overlapped:.1f} ms of communication overlapped)"


def experts_in_parallel(search: Search) -> Iterator[str]:
    """Whether EP is better than replicated experts: in bytes (tokens per rank and step against E*F), and in time."""
    best = search.best
    model, micro = best.config.model, best.config.train.accumulation
    if not model.moe_blocks:
        return
    tokens = micro * routed_rows(model, expected_batch(best.config, best.layout)) / best.layout.tp
    break_even = model.num_experts * model.moe_width
    fewer = tokens < break_even
    yield (
        f"expert parallelism: a rank sends {tokens:,.0f} rows per layer and step, E*F = {break_even:,}; EP sends fewer"
        f" bytes than replicated experts if rows < E*F, so for this plan it sends {'fewer' if fewer else 'more'} bytes"
    )
    alone = _counterpart(search, lambda p: p.layout.ep == 1)
    spread = best if best.layout.ep > 1 else _counterpart(search, lambda p: p.layout.ep > 1 and p.ep_nodes == 1)
    if not (alone and spread):
        return
    (replicated_bytes, replicated_total), (parallel_bytes, parallel_total) = _expert_bytes(alone), _expert_bytes(spread)
    yield (
        f"  ep 1: {1e3 * alone.time.total:.1f} ms, {alone.memory.peak / GIB:.1f} GiB"
        f"{'' if alone in search.fitting else ', which does not fit'};"
        f" each GPU sends {replicated_bytes / 1e6:,.0f} MB of expert gradients and parameters"
    )
    yield (
        f"  ep {spread.layout.ep}: {1e3 * spread.time.total:.1f} ms, {spread.memory.peak / GIB:.1f} GiB;"
        f" {parallel_bytes / 1e6:,.0f} MB of these and {(parallel_total - replicated_total) / 1e6:,.0f} MB of rows,"
        " whose exchange adds latency and waits for the fullest rank"
    )
    if alone in search.fitting:
        yield f"  {_verdict_in_time(alone, spread, fewer)}"


def _verdict_in_time(alone: Plan, spread: Plan, fewer_bytes: bool) -> str:
    """Whether EP (`spread`) is faster, and the reason if the bytes suggest the opposite."""
    gain = alone.time.total / spread.time.total
    difference = f"{1e3 * abs(alone.time.total - spread.time.total):.1f} ms of a step"
    if gain > CLOSE:
        why = "" if fewer_bytes else ", although it sends more bytes: they cross faster links or are overlapped"
        return f"EP is faster: it saves {difference}{why}"
    if gain < 1 / CLOSE:
        why = ", although it sends fewer bytes: latency and imbalance outweigh them" if fewer_bytes else ""
        return f"EP is slower: it costs {difference}{why}"
    saved = (alone.memory.peak - spread.memory.peak) / GIB
    return (
        f"EP is about as fast: it differs by {difference}, less than the {CLOSE - 1:.0%} that estimates can resolve;"
        f" it {'saves' if saved >= 0 else 'needs'} {abs(saved):.1f} GiB{'' if saved >= 0 else ' more'} of each GPU"
    )


def _counterpart(search: Search, wanted: Callable[[Plan], bool]) -> Plan | None:
    """The fastest wanted plan with the stage and recomputation of the best; one that fits if there is one."""
    best = search.best
    same = [
        p
        for p in (*search.fitting, *search.too_large)
        if wanted(p) and p.stage == best.stage and p.config.parallel.recompute == best.config.parallel.recompute
        if p.layout.shard_ranks == best.layout.shard_ranks
    ]
    return min(same, key=lambda p: (p not in search.fitting, p.time.total), default=None)


def _expert_bytes(plan: Plan) -> tuple[float, float]:
    """Bytes that a rank sends in a step: (expert gradients and parameters, rows)."""
    calls = collectives(plan.config, plan.layout)
    return sum(c.wire for c in calls if c.over.startswith("edp")), sum(c.wire for c in calls if c.op == "all_to_all")


def costs(plan: Plan) -> str:
    """Steps, hours and GPU-hours of the whole training."""
    steps = plan.config.train.steps
    return (
        f"{steps:,} steps of {plan.config.train.global_batch} images: {plan.hours:,.1f} hours,"
        f" {plan.hours * plan.layout.world:,.0f} GPU-hours (without checkpoints, samples and restarts)"
    )


def settings(plan: Plan, base: Config) -> dict[str, str]:
    """The settings that turn `base` into this plan: key -> value. Always has the layout, since launchers set one."""
    parallel, train = plan.config.parallel, plan.config.train
    out = {"parallel.tp": str(parallel.tp), "parallel.ep": str(parallel.ep), "train.deepspeed": train.deepspeed}
    if parallel.expert_tp or base.parallel.expert_tp:
        out["parallel.expert_tp"] = str(parallel.expert_tp).lower()
    if parallel.shard_ranks or base.parallel.shard_ranks:
        out["parallel.shard_ranks"] = str(parallel.shard_ranks)
    if parallel.recompute != "none" or base.parallel.recompute != "none":
        out["parallel.recompute"] = parallel.recompute
    if train.accumulation != base.train.accumulation:
        out["train.accumulation"] = str(train.accumulation)
    return out
