"""`megapromoe plan --rehearse`: one rank of a planned layout runs on this machine, and is compared with the plan."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megapromoe.config.options import Config
from megapromoe.errors import UserError
from megapromoe.planning.machines import GIB
from megapromoe.routing_trace import read_trace
from megapromoe.work_progress import Progress

if TYPE_CHECKING:  # they import torch
    from megapromoe.benchmark.rehearsal import Comparison, ModelRehearsal
    from megapromoe.benchmark.rehearsed_update import UpdateRehearsal

T = TypeVar("T")
CLOSE = 0.1  # memory beyond the planned peak that still agrees
CONTEXT: BaseContext = multiprocessing.get_context("spawn")


class RehearsalFailed(UserError):
    """The rehearsal did not end, or its figures are not those of the plan."""


def rehearse(config: Config, world: int, rank: int, trace: Path | None) -> Iterator[str]:
    """Rehearses a rank, and yields the lines of the result.

    Args:
        config: of the run, with its layout.
        world: number of ranks.
        rank: the rank, 0 to world - 1.
        trace: a run with a routing trace, or the file; its shares of rows take the place of even ones.

    Raises RehearsalFailed after the last line if messages or memory are not those of the plan; RehearsalError if the
    configuration cannot be rehearsed; TraceError if the trace cannot be read or is of another model.
    """
    from megapromoe.benchmark.rehearsal import rehearse_model
    from megapromoe.benchmark.rehearsed_update import rehearse_update

    shares = None if trace is None else shares_of(trace)
    with Progress(2, "part", "rehearsal") as progress:
        progress.note("forward and backward pass")
        model = in_new_process(rehearse_model, config, world, rank, shares)
        progress.update(1)
        progress.note("optimizer step")
        update = in_new_process(rehearse_update, config, world, rank)
        progress.update(1)
    yield from model_lines(model, config, world, rank, trace)
    yield from update_lines(update)
    compared = [*model.messages, *(update.messages if update else ())]
    wrong = [f"{c.planned.op} over {c.planned.over}" for c in compared if not c.agrees]
    if model.peak > (1 + CLOSE) * model.planned_peak:
        wrong.append("the peak of the activations")
    if wrong:
        raise RehearsalFailed(
            f"rank {rank} of {world}: the plan and the rehearsal differ in {', '.join(wrong)}, see the table; times and"
            " memory that are estimated from these figures are wrong by as much: please report it"
        )


def shares_of(trace: Path) -> list[list[float]]:
    """For each MoE layer the share of the rows that each expert got, over all records. Raises TraceError."""
    rows_ME = read_trace(trace).rows_NME.sum(0)
    even = 1 / rows_ME.shape[1]
    return [[float(n) / int(row.sum()) if row.sum() else even for n in row] for row in rows_ME]


def model_lines(model: ModelRehearsal, config: Config, world: int, rank: int, trace: Path | None) -> Iterator[str]:
    batch = model.batch
    yield f"rehearsal of rank {rank} of {world}; {batch.images} images in a micro-batch, {batch.conditional:g} not null"
    if config.model.moe_blocks:
        loads = "the same rows for each expert" if trace is None else f"the shares of rows in {trace}"
        yield f"  routing: {loads}; the experts of this rank get {model.fullness:.3f} times the mean of the ranks"
    yield "  forward and backward pass, real sizes, tensors without memory"
    yield from _table(model.messages)
    yield "  memory besides parameters and gradients, GiB        planned   rehearsed  planned/rehearsed"
    pairs = (("kept for the backward pass", model.planned_kept, model.kept), ("peak", model.planned_peak, model.peak))
    for name, planned, rehearsed in pairs:
        yield f"    {name:44} {planned / GIB:12.3f} {rehearsed / GIB:11.3f} {planned / rehearsed:18.3f}"


def update_lines(update: UpdateRehearsal | None) -> Iterator[str]:
    if update is None:
        yield "  optimizer step: not rehearsed at ZeRO-3, which fetches parameters within the model"
        return
    yield f"  gradients and optimizer step, real tensors, the same layers at hidden size {update.hidden_size}"
    yield from _table(update.messages)


def _table(messages: Iterable[Comparison]) -> Iterator[str]:
    lines = list(messages)
    if not lines:
        yield "    no messages"
        return
    yield "    message         over          ranks      calls  rehearsed     planned MB   rehearsed MB"
    for c in lines:
        p, r = c.planned, c.rehearsed
        numbers = f"{p.calls:10,} {r.calls:10,} {p.payload / 1e6:14,.3f} {r.payload / 1e6:14,.3f}"
        yield f"    {p.op:15} {p.over:12} {p.size:6} {numbers}  {'' if c.agrees else 'differs'}".rstrip()


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function in a new process: it makes a job without other ranks, and tensors without memory."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RehearsalFailed(
                "the process of the rehearsal was killed, perhaps for want of memory: rehearse a layout with a smaller"
                " micro-batch, or on a machine with more memory"
            ) from error
