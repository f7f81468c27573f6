"""The start of a run from the weights of a checkpoint, `train.init_from`: collective, with bounded memory.

Each rank reads the tensors of which it keeps something, one after the other, and writes its part to its masters and
averages. So it never holds more than its share and one tensor, and the result does not depend on the layout. Experts
from the MLPs of a dense model are an exception: rank 0 runs that model for the prototypes.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megapromoe.config.options import Config
from megapromoe.conversion.start_report import Report, lines, report
from megapromoe.conversion.starting_weights import StartingWeights, newest_checkpoint, open_start
from megapromoe.conversion.upcycle import Prototypes
from megapromoe.distributed import watchdog
from megapromoe.distributed.agreement import broadcast_from_rank0, raising_together, this_rank, world_size
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.errors import ExitCode, UserError


class StartError(UserError):
    """A checkpoint that the run cannot start from."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True


def start_from_weights(config: Config, engine: Engine, ema: EMA) -> Report | None:
    """Writes the weights of `train.init_from` to the masters, averages and parameters of a new run. Collective.

    Without the option nothing is changed. The moments of the optimizer are not touched.

    Returns:
        what was taken, made new and left out; None without the option.

    Raises StartError on every rank, before anything that is saved is written, if the checkpoint cannot be used.
    """
    if not config.train.init_from:
        return None
    source: Path | None = None
    start: StartingWeights | None = None
    wrong = ExitCode.MISCONFIGURED
    with raising_together(StartError, exit_code=wrong):
        if this_rank() == 0:
            source = newest_checkpoint(Path(config.train.init_from))
    source = broadcast_from_rank0(source)  # another rank might find a newer checkpoint
    assert source is not None  # rank 0 raised otherwise
    watchdog.starting("opening train.init_from", math.inf)  # verifying the hashes reads all bytes
    with raising_together(StartError, exit_code=wrong):
        start = open_start(config, source, (this_rank(), world_size()))
    assert start is not None
    prototypes: dict[int, Prototypes] = {}
    if start.needs_prototypes:
        watchdog.starting("computing prototypes from train.init_from", math.inf)
        with raising_together(StartError, exit_code=wrong):
            if this_rank() == 0:
                prototypes = start.prototypes()
        prototypes = broadcast_from_rank0(prototypes)
    watchdog.starting("reading train.init_from", math.inf)
    with raising_together(StartError, exit_code=wrong):
        _write(engine, ema, start, prototypes)
    engine.sync_parameters_from_masters()
    return report(start)


@torch.no_grad()
def _write(engine: Engine, ema: EMA, start: StartingWeights, prototypes: dict[int, Prototypes]) -> None:
    """Writes this rank's part of the weights to its masters and averages, and the buffers to the model."""
    state = start.state(prototypes)
    for partition, *averages in zip(engine.partitions, *ema.averages, strict=True):
        for piece in partition.pieces:
            watchdog.touch()
            span = slice(piece.offset, piece.offset + piece.stop - piece.start)
            target = engine.layouts[piece.name].shard_range(engine.mesh, piece.start, piece.stop)
            master = partition.master.detach()[span]
            start.read_into(state, piece.name, target, master)
            for average in averages:
                average[span].copy_(master)
    for name, tensor in engine.module.state_dict().items():
        if name not in engine.layouts and name in state.buffers:
            tensor.copy_(state.buffers[name])


def examine_start_from_weights(config: Config) -> list[str]:
    """The table of `start_from_weights` without reading more than hashes; empty without `train.init_from`.

    Raises UserError if the checkpoint cannot be used.
    """
    if not config.train.init_from:
        return []
    return lines(report(open_start(config, newest_checkpoint(Path(config.train.init_from)))))
