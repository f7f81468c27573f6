"""The action `place` of `megapromoe routing`: which ranks should have which experts, by the load of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import CommandError, file_errors, whole_number
from megapromoe.commands.routing_trace import print_table
from megapromoe.config.expert_placement import AUTO, ExpertPlacement, Placements, placement_text, smallest_slots
from megapromoe.imports import uncollected

if TYPE_CHECKING:
    import numpy as np

    from megapromoe.config.options import Config
    from megapromoe.training.expert_placement import Loads

OF_PLACE = ("ep", "slots", "nodes", "replicas")
OF_TRACE = ("from_step", "to_step")  # of the action `trace`, of which `place` has these two options


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the action."""
    add = parser.add_argument
    add("--ep", type=whole_number(2), metavar="N", help="place: expert-parallel ranks; default: parallel.ep of the run")
    add(
        "--slots",
        type=whole_number(1),
        metavar="N",
        help="place: experts that a rank stores at most; default: as few as possible, which takes no more memory than"
        " consecutive experts",
    )
    add(
        "--nodes",
        type=whole_number(1),
        metavar="N",
        help="place: nodes over which an expert-parallel group is spread, whose loads are balanced too; default: 1",
    )
    add(
        "--replicas",
        type=_replicas,
        metavar="N|auto",
        help="place: copies of experts of other ranks that a rank holds at most, which get a part of their rows; auto:"
        " as few as give the fullest rank at most 1.05 times the mean rows; default: none",
    )


def _replicas(text: str) -> int | str:
    """The value of --replicas."""
    return text if text == AUTO else whole_number(1)(text)


def check_options(options: argparse.Namespace) -> None:
    """Raises CommandError for options of another action."""
    if options.action == "place":
        defaults = {name: default for name, default in options.defaults.items() if name not in OF_TRACE}
        wrong, rule = [n for n, default in defaults.items() if getattr(options, n) != default], "is not for"
    else:
        wrong, rule = [name for name in OF_PLACE if getattr(options, name) is not None], "is for"
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise CommandError(f"{flags}: {rule} megapromoe routing place; leave it out")


def run(options: argparse.Namespace) -> int:
    """Writes the file of the placement, and prints the load of the fullest rank without and with it."""
    with uncollected():
        from megapromoe.config.options import ConfigError
        from megapromoe.io import write_text
        from megapromoe.planning.placement_search import fullest_over_mean, place_experts
        from megapromoe.routing_analysis.observe import RoutingError
        from megapromoe.sampling.run_model import run_config
        from megapromoe.training.expert_placement import balance, load_lines, recorded_loads, with_replicas

    out: Path = options.out or options.run / "routing" / "placement.yaml"
    try:
        with file_errors():
            config = run_config(options.run)
    except ConfigError as error:  # the error is in config.yaml of the run, not in the command
        raise RoutingError(str(error)) from error
    blocks, experts = config.model.moe_blocks, config.model.num_experts
    ep = options.ep or config.parallel.ep
    _check_sizes(options, blocks, experts, ep)
    config = replace(config, parallel=replace(config.parallel, ep=ep))
    with file_errors():
        loads = recorded_loads(options.run, config, options.from_step, options.to_step)
    if loads is None:
        raise RoutingError(
            f"{options.run}: its metrics.jsonl has no load of experts in these steps; train longer, or give others"
        )
    solve = partial(place_experts, ep=ep, slots=options.slots, nodes=options.nodes or 1)
    if options.replicas and len(loads.steps_R) < 2:
        raise RoutingError(
            f"--replicas: needs the load of two steps or more, not of {loads.in_words}; give other steps"
        )
    placed_M = with_replicas(loads.count_RME, solve(loads.count_RME), options.replicas or 0)
    placements = dict(zip(blocks, placed_M, strict=True))
    lines = [f"placed by the load of {loads.in_words}", *load_lines(loads, placements, config)]
    with file_errors():
        write_text(out, placement_text(placements, lines), parents=True)
    placed = "placed, with copies" if options.replicas else "placed"
    rows = [["block", "fullest/mean, consecutive", placed, "experts of each rank"]]
    consecutive = ExpertPlacement.contiguous(experts, ep)
    for layer, (block, placement) in enumerate(placements.items()):
        count_RME = loads.count_RME[:, [layer]]
        before, after = (fullest_over_mean(count_RME, [one_layer]) for one_layer in (consecutive, placement))
        numbers = " ".join(str(len(owned)) for owned in placement.experts_of_rank)
        rows.append([str(block), f"{before:.3f}", f"{after:.3f}", numbers])
    before, after = balance(loads.count_RME, placements, config)
    rows.append(["all", f"{before:.3f}", f"{after:.3f}", ""])
    print(f"{loads.in_words}: {experts} experts over {ep} ranks")
    print_table(rows)
    if options.replicas:
        _print_later_steps(options.replicas, loads, solve, config)
        for line in _price(placements, config):
            print(line)
    slots, smallest = max(placement.slots for placement in placed_M), smallest_slots(experts, ep)
    if slots > smallest:
        print(
            f"a rank stores up to {slots} experts of a block instead of {smallest}; `megapromoe plan` shows the memory"
        )
    print(f"{out}: for the next start, parallel.ep={ep} parallel.placement={out}")
    return 0


def _print_later_steps(
    replicas: int | str, loads: Loads, solve: Callable[[np.ndarray], Sequence[ExpertPlacement]], config: Config
) -> None:
    """Prints what copies give in steps from which they were not chosen: the later half of the records.

    Prints fullest over mean of each block, and its median and 95th percentile over the records.
    """
    import numpy as np

    from megapromoe.planning.placement_search import fullest_over_mean_of_records
    from megapromoe.training.expert_placement import Loads, with_replicas

    halves = slice(len(loads.steps_R) // 2), slice(len(loads.steps_R) // 2, None)
    first, later = (Loads(loads.steps_R[half], loads.count_RME[half], loads.file) for half in halves)
    placed_M = solve(first.count_RME)
    copied_M = with_replicas(first.count_RME, placed_M, replicas)
    consecutive = ExpertPlacement.contiguous(config.model.num_experts, config.parallel.ep)
    choices = {"consecutive": [consecutive] * len(placed_M), "placed": placed_M, "with copies": copied_M}
    print(f"chosen by {first.in_words} alone, in {later.in_words}: fullest/mean (median, p95 over the records)")
    rows = [["block", *choices]]
    blocks = config.model.moe_blocks
    parts = [(str(block), [layer]) for layer, block in enumerate(blocks)]
    for name, layers in [*parts, ("all", [*range(len(blocks))])]:
        cells = []
        for placements in choices.values():
            ratio, ratio_R = fullest_over_mean_of_records(later.count_RME[:, layers], [placements[i] for i in layers])
            middle, high = np.percentile(ratio_R, (50, 95)) if len(ratio_R) else (1.0, 1.0)  # without any rows
            cells.append(f"{ratio:.3f} ({middle:.3f}, {high:.3f})")
        rows.append([name, *cells])
    print_table(rows)


def _price(placements: Placements, config: Config) -> Iterator[str]:
    """Sentences on memory and bytes of the copies in the file."""
    from megapromoe.planning.cost import expert_elements
    from megapromoe.planning.zero import zero_of

    etp = config.parallel.tp if config.parallel.expert_tp else 1
    expert = expert_elements(config.model, etp) * zero_of(config).width
    held = [placement.replica_slots for placement in placements.values()]
    copies = sum(placement.copies for placement in placements.values())
    passes = config.train.accumulation * (1 + (config.parallel.recompute != "none"))
    kept = max(held) if config.parallel.recompute != "none" else sum(held)
    sent = copies / config.parallel.ep * expert
    yield (
        f"copies of experts: up to {max(held)} on a rank in a block, {copies} in all blocks of a group:"
        f" {kept * expert / 1e6:,.2f} MB of weights on a rank until the backward pass,"
        f" {max(held) * expert / 1e6:,.2f} MB of gradients of a block"
    )
    yield (
        f"a rank sends on average {passes * sent / 1e6:,.2f} MB of weights and"
        f" {config.train.accumulation * sent / 1e6:,.2f} MB of gradients a step for them"
    )


def _check_sizes(options: argparse.Namespace, blocks: tuple[int, ...], experts: int, ep: int) -> None:
    """Raises CommandError for numbers that do not fit the model of the run."""
    nodes, problems = options.nodes or 1, []
    if not blocks:
        problems.append(f"{options.run}: its model has no routed experts to place")
    elif not 2 <= ep <= experts:
        problems.append(f"--ep {ep}: must be from 2 to {experts}, the experts of a block")
    else:
        if options.slots and options.slots * ep < experts:
            problems.append(f"--slots {options.slots}: {ep} ranks need at least {smallest_slots(experts, ep)}")
        if ep % nodes:
            problems.append(f"--nodes {nodes}: must divide the {ep} ranks of a group")
    if problems:
        raise CommandError("; ".join(problems))
