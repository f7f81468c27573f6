"""Where the experts of a run and their copies are, read or chosen at the beginning of a start.

The options are `parallel.placement` and `parallel.replicas`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.expert_placement import AUTO, CONTIGUOUS, ExpertPlacement, Placements, placement_text
from megapromoe.config.options import Config
from megapromoe.distributed.agreement import broadcast_from_rank0, raising_together, this_rank, world_size
from megapromoe.io import write_text
from megapromoe.planning.machines import Assumptions
from megapromoe.planning.memory import budget
from megapromoe.planning.placement_search import fullest_over_mean, place_experts
from megapromoe.planning.replica_search import fewest_replicas, replicate_experts
from megapromoe.routing_trace import TraceError, read_trace, trace_file
from megapromoe.run_lines import metrics_of

logger = logging.getLogger(__name__)

PLACEMENT_FILE = "placement.yaml"  # of a run: what `parallel.placement=auto` has chosen at the latest start
LAST_STEPS = 1000  # whose loads determine a placement


class Loads(NamedTuple):
    """Rows of the experts in some steps of a run."""

    steps_R: np.ndarray
    """The step of each record, ascending; in metrics.jsonl a record is the sum over the steps of a log line."""
    count_RME: np.ndarray
    """Rows of each record, MoE layer and expert."""
    file: str
    """Where they are from."""

    @property
    def in_words(self) -> str:
        """Such as "steps 20 to 1,000 (metrics.jsonl)"."""
        return f"steps {self.steps_R[0]:,} to {self.steps_R[-1]:,} ({self.file})"


@dataclass(frozen=True)
class ChosenPlacement:
    """The placement of a start.

    Attributes:
        placements: of each block with routed experts; empty: consecutive experts.
        lines: what was chosen and why, for the log.
        text: of the file to write in the run; "" if none.
    """

    placements: Placements = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    text: str = ""

    @property
    def owner_ME(self) -> np.ndarray | None:
        """The expert-parallel rank of each expert, for a routing trace; None for consecutive experts."""
        if not self.placements:
            return None
        return np.array([placement.rank_of_expert for _, placement in sorted(self.placements.items())])


def recorded_loads(run: Path, config: Config, first: int | None = None, last: int | None = None) -> Loads | None:
    """The loads of some steps of a run, from its routing trace or from its metrics.jsonl.

    The trace has single steps. It is not used if it ends `LAST_STEPS` steps or more before metrics.jsonl.

    Args:
        run: the run directory.
        config: of the run; records of another number of layers or experts do not count.
        first: the first step that counts; None: the last `LAST_STEPS` steps of the records.
        last: the last step that counts; None: all.

    Returns None if there are none. Raises TraceError for a trace without such records or with damaged ones, OSError for
    a file that cannot be read.
    """
    shape = len(config.model.moe_blocks), config.model.num_experts
    path = RunDirectory(run).metrics
    lines = [line for line in metrics_of(path) if np.shape(line.get("expert_load") or 0) == shape]
    lines = [line for line in lines if (first or 0) <= line["step"] and (last is None or line["step"] <= last)]
    rows = np.array([line["expert_load"] for line in lines], dtype=np.float64)
    loads = Loads(np.array([line["step"] for line in lines], dtype=np.int64), rows, path.name)
    if trace_file(run).exists():
        trace = read_trace(run, first or 0, last)
        is_recent = not lines or trace.steps_N[-1] > lines[-1]["step"] - LAST_STEPS
        if is_recent and trace.rows_NME.shape[1:] == shape:
            loads = Loads(trace.steps_N, trace.rows_NME, trace_file(run).name)
    if not len(loads.steps_R):
        return None
    if first is None:
        is_last = loads.steps_R > loads.steps_R[-1] - LAST_STEPS
        loads = Loads(loads.steps_R[is_last], loads.count_RME[is_last], loads.file)
    return loads


def choose_placement(
    config: Config, run: RunDirectory, until: int | None, local_world: int, memory: int | None = None
) -> ChosenPlacement:
    """The placement of a start, the same on every rank. Collective.

    Args:
        config: of the run.
        run: its directory, which rank 0 reads.
        until: the step that the start goes back to; None: the newest.
        local_world: ranks on a node.
        memory: bytes of a rank's device, which limit `parallel.replicas=auto`; None: no limit.

    Raises RunDirectoryError on every rank if the file is wrong or cannot be read.
    """
    if config.parallel.placement == CONTIGUOUS or config.parallel.ep == 1:
        return ChosenPlacement()
    chosen = ChosenPlacement()
    with raising_together(RunDirectoryError):
        if this_rank() == 0:
            chosen = _choose(config, run.folder, until, local_world, memory)
    return broadcast_from_rank0(chosen)


def _choose(
    config: Config, run: Path, until: int | None, local_world: int, memory: int | None = None
) -> ChosenPlacement:
    try:
        loads = recorded_loads(run, config, last=until)
    except (TraceError, OSError) as error:
        logger.warning("parallel.placement: the load of the run so far cannot be used: %s", error)
        loads = None
    blocks, ep = config.model.moe_blocks, config.parallel.ep
    if config.parallel.placement != AUTO:
        placements = config.placements_in_file()
        return ChosenPlacement(placements, tuple(load_lines(loads, placements, config)))
    if loads is None:
        reason = "no load of experts is recorded yet"
        return ChosenPlacement(lines=(f"consecutive ones on each rank: {reason} (parallel.placement=auto)",))
    placed_M = place_experts(loads.count_RME, ep, nodes=nodes_of_group(config, local_world))
    placed_M = with_replicas(loads.count_RME, placed_M, config.parallel.replicas, copies_fit(config, memory))
    placements = dict(zip(blocks, placed_M, strict=True))
    lines = [f"placed by the load of {loads.in_words}", *load_lines(loads, placements, config)]
    return ChosenPlacement(placements, tuple(lines), placement_text(placements, lines))


def with_replicas(
    count_RME: np.ndarray,
    placed_M: Sequence[ExpertPlacement],
    replicas: int | str,
    fits: Callable[[int], bool] = lambda number: True,
) -> tuple[ExpertPlacement, ...]:
    """The placements with the copies that a value of `parallel.replicas` asks for; `fits`: see `fewest_replicas`."""
    if replicas == AUTO:
        return fewest_replicas(count_RME, placed_M, fits)
    return replicate_experts(count_RME, placed_M, int(replicas)) if replicas else tuple(placed_M)


def copies_fit(config: Config, memory: int | None) -> Callable[[int], bool]:
    """Whether a step with so many copies on each rank fits into a device with `memory` bytes, by the plan.

    Source: planning/memory.py, with the share of the memory and the imbalance that plans assume. None: always.
    """

    def fits(number: int) -> bool:
        if memory is None:
            return True
        copied = replace(config, parallel=replace(config.parallel, replicas=number))
        assume = Assumptions()
        return budget(copied, copied.layout(world_size()), assume.imbalance).peak <= memory * assume.usable

    return fits


def nodes_of_group(config: Config, local_world: int) -> int:
    """Nodes over which an expert-parallel group is spread; 1 if nodes do not divide it evenly."""
    ranks = config.parallel.ep * (config.parallel.tp if config.parallel.expert_tp else 1)
    nodes = -(-ranks // local_world)
    return nodes if config.parallel.ep % nodes == 0 else 1


def load_lines(loads: Loads | None, placements: Placements, config: Config) -> Iterator[str]:
    """A sentence on the fullest rank under the recorded loads, with consecutive experts and with the placements.

    With copies of experts another sentence on them.
    """
    if most := max((placement.replica_slots for placement in placements.values()), default=0):
        numbers = sum(placement.copies for placement in placements.values()), len(placements)
        yield f"copies of experts: up to {most} on a rank in a block, {numbers[0]} in all {numbers[1]} blocks"
    if loads is None:
        return
    before, after = balance(loads.count_RME, placements, config)
    yield (
        f"in {loads.in_words} the fullest rank would have had {after:.3f} times the mean rows, with consecutive experts"
        f" {before:.3f} times"
    )


def balance(count_RME: np.ndarray, placements: Placements, config: Config) -> tuple[float, float]:
    """Rows of the fullest rank over the mean: with consecutive experts, and with the placements."""
    consecutive = ExpertPlacement.contiguous(config.model.num_experts, config.parallel.ep)
    placed_M = [placements[block] for block in config.model.moe_blocks]
    return fullest_over_mean(count_RME, [consecutive] * len(placed_M)), fullest_over_mean(count_RME, placed_M)


def write_placement(folder: Path, chosen: ChosenPlacement) -> None:
    """Writes the placement that was chosen into the folder of the run, if it was. Logs a failure."""
    if chosen.text:
        try:
            write_text(folder / PLACEMENT_FILE, chosen.text)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", folder / PLACEMENT_FILE, error.strerror)
