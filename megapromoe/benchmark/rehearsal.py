"""Runs one rank of a layout without its cluster, and compares messages and memory with the plan.

The model of the rank has its real sizes. Its tensors are fake: they have shapes, types and storages, but neither memory
nor values. The groups of the layout are torch's "fake" process groups, which complete every collective and send
nothing. How many rows each expert gets, which a router decides by values, is given instead: even, or by shares.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapromoe.config.model_options import BATCH_CHOICE_ROUTERS
from megapromoe.config.options import Config, ParallelConfig
from megapromoe.diffusion.objectives import make_objective
from megapromoe.distributed import runtime
from megapromoe.distributed.mesh import Group, Mesh, rank_tables
from megapromoe.errors import ExitCode, UserError
from megapromoe.nn.moe.dispatcher import ArrangedRows, DispatchedRows, Dispatcher
from megapromoe.nn.moe.expert_parallel_dispatcher import ExpertParallelDispatcher
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.parallelize import build
from megapromoe.nn.text_condition import TextCondition
from megapromoe.planning.activations import saved_tensors
from megapromoe.planning.memory import both_passes, replica_bytes
from megapromoe.planning.traffic import Batch, Collective, collectives
from megapromoe.planning.zero import zero_of

OPS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
RETURNED = (("combine: rows to sources", "forward"), ("dispatch: rows to experts", "backward"))


class RehearsalError(UserError):
    """A configuration that cannot be rehearsed. The message gives the reason and a remedy."""

    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class Messages:
    """Collectives of one kind over one group.

    Attributes:
        op: as in `planning.traffic.Collective`.
        over: the direction of the group; several, if they have the same ranks.
        size: ranks of the group.
        calls, payload: number of calls, and bytes that all of them hand in (of gathers: return).
    """

    op: str
    over: str
    size: int
    calls: int
    payload: float


@dataclass(frozen=True)
class Comparison:
    """Planned and rehearsed messages of one kind over one group."""

    planned: Messages
    rehearsed: Messages

    @property
    def agrees(self) -> bool:
        """Whether calls are equal, and bytes to the rounding of a mean over ranks: less than one row a call."""
        same_bytes = abs(self.planned.payload - self.rehearsed.payload) <= 1e-9 * self.planned.payload
        return self.planned.calls == self.rehearsed.calls and same_bytes


@dataclass(frozen=True)
class ModelRehearsal:
    """One forward and backward pass of a rank.

    Attributes:
        batch: images of the micro-batch.
        fullness: rows that the experts of the rank get, relative to those that it sends, mean over layers.
        messages: of all kinds and groups, planned and rehearsed.
        kept, planned_kept: bytes alive after the forward pass, besides parameters.
        peak, planned_peak: the most bytes alive in both passes, besides parameters and their gradients.
    """

    batch: Batch
    fullness: float
    messages: tuple[Comparison, ...]
    kept: int
    planned_kept: float
    peak: int
    planned_peak: float


@contextmanager
def fake_job(rank: int, world: int) -> Iterator[None]:
    """A torch.distributed job of which this process is one rank, and which has no other."""
    runtime.init_fake_process_group(rank, world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of_job(parallel: ParallelConfig) -> Mesh:
    """The mesh of this rank of a fake job; groups without this rank are not made."""
    rank, world, p, groups = dist.get_rank(), dist.get_world_size(), parallel, {}
    for direction, table in rank_tables(world, p.tp, p.ep, p.expert_tp, p.shard_ranks).items():
        ranks = next(tuple(map(int, row)) for row in table if rank in row)
        groups[direction] = Group(ranks, ranks.index(rank), dist.new_group(ranks))
    return Mesh(**groups, expert_tp=p.expert_tp)


def rehearse_model(
    config: Config, world: int, rank: int, shares_ME: Sequence[Sequence[float]] | None = None
) -> ModelRehearsal:
    """Runs forward and backward pass of one micro-batch of a rank on fake tensors.

    Args:
        config: of the run, with its layout.
        world: number of ranks.
        rank: the rank to rehearse, 0 to world - 1.
        shares_ME: for each MoE layer the share of the rows that each expert gets; None: even.

    Raises RehearsalError if the number of rows depends on values.
    """
    _check(config, world, rank, shares_ME)
    layout, parallel = config.layout(world), config.parallel
    images = layout.micro_batch
    batch = Batch(images, round(images * (1 - config.data.condition_dropout)))
    dtype = torch.bfloat16 if zero_of(config).width == 2 else torch.float32
    with fake_job(rank, world):
        mesh = mesh_of_job(parallel)
        with FakeTensorMode():
            model = build(config, mesh, undrawn=dtype, placements=config.placements_in_file()).train()
            dispatchers = _give_counts(model, shares_ME)
            inputs = _inputs(config, batch)
            objective = make_objective(config)
            clean, noise, u = torch.empty_like(inputs[0]), torch.empty_like(inputs[0]), torch.empty(images)
            with Recorder(model) as recorder:
                prediction, auxiliary = model(*inputs)
                loss = objective.loss(prediction, clean, noise, u) + auxiliary.total()
                del prediction, auxiliary
                gc.collect()
                kept = recorder.bytes
                loss.backward()
        sent, received = (sum(getattr(d, name) for d in dispatchers) for name in ("sent", "received"))
        fullness = received / sent if sent else 1.0
        planned = _of_model(config, world, batch, fullness, copies_of(config, mesh.ep.rank))
        messages = compare(recorder.messages, planned, mesh)
    planned_kept = sum(s.bytes * (fullness if s.rows else 1) for s in saved_tensors(config, layout, batch))
    planned_kept += replica_bytes(config, layout)[0]
    passes = both_passes(config, layout, batch, fullness)
    planned_peak = sum(passes.values()) - passes["dispatch"]  # those buffers are freed when the peak is reached
    return ModelRehearsal(batch, fullness, messages, kept, planned_kept, recorder.peak, planned_peak)


def _check(config: Config, world: int, rank: int, shares_ME: Sequence[Sequence[float]] | None) -> None:
    model = config.model
    if not 0 <= rank < world:
        raise RehearsalError(f"rank {rank}: must be 0 to {world - 1}, a rank of the {world} of the layout")
    if model.router in BATCH_CHOICE_ROUTERS:
        raise RehearsalError(
            f"model.router = {model.router!r}: the number of its rows depends on the scores, which a rehearsal does not"
            " have; rehearse the layout with model.router=tc"
        )
    if config.parallel.replicas and config.parallel.ep > 1:
        raise RehearsalError(
            f"parallel.replicas = {config.parallel.replicas!r}: which experts have copies is chosen at a start;"
            " rehearse a file of `megapromoe routing place --replicas`, by parallel.placement=FILE"
        )
    shape = (len(model.moe_blocks), model.num_experts)
    if shares_ME is not None and (len(shares_ME), *{len(row) for row in shares_ME}) != shape:
        raise RehearsalError(f"loads: must be of {shape[0]} MoE layers and {shape[1]} experts, those of the model")


def _inputs(config: Config, batch: Batch) -> tuple:
    """Arguments of the model: noisy images, times, labels or texts, the number of conditional images."""
    m, B = config.model, batch.images
    x, t = torch.empty(B, m.in_channels, m.input_size, m.input_size), torch.empty(B)
    y: Tensor | TextCondition = torch.empty(B, dtype=torch.int64)
    if m.has_text:
        features = torch.empty(B, m.text_tokens, m.text_width, dtype=torch.bfloat16)
        y = TextCondition(features, torch.empty(B, m.text_tokens, dtype=torch.bool))
    return x, t, y, int(batch.conditional)


def copies_of(config: Config, rank: int) -> dict[str, float]:
    """Weights of copies that a rank of the ep group sends, and gradients, over the means of all ranks.

    The keys are the names of the planned collectives.
    """
    placements = [placement for placement in config.placements_in_file().values() if placement.replicas]
    if not placements:
        return {}
    mean = sum(placement.copies for placement in placements) / config.parallel.ep
    held = sum(len(placement.copies_of_rank[rank]) for placement in placements)
    owners = [p.rank_of_expert[expert] for p in placements for copies in p.copies_of_rank for expert in copies]
    sent = owners.count(rank)
    return {"replicas: weights": sent / mean, "replicas: gradients": held / mean}


def _of_model(
    config: Config, world: int, batch: Batch, fullness: float, copies: Mapping[str, float]
) -> list[Collective]:
    """The planned collectives of one micro-step of the model.

    What the experts of a rank send back is what they got, of which a plan states the mean over ranks. `copies`: see
    `copies_of`.
    """
    result, micro = [], config.train.accumulation
    for c in collectives(config, config.layout(world), batch):
        if c.ours and c.phase in ("forward", "backward"):
            returned = (c.what, c.phase) in RETURNED and not config.model.capacity_factor
            factor = fullness if returned else copies.get(c.what, 1)
            result.append(replace(c, count=c.count // micro, payload=c.payload * factor))
    return result


def compare(
    measured: Mapping[tuple[str, tuple[int, ...]], Sequence[int]], planned: Iterable[Collective], mesh: Mesh
) -> tuple[Comparison, ...]:
    """Planned and measured messages of each kind and group, groups in the order of the mesh."""
    directions = dict(sorted(mesh.directions.items(), key=lambda item: item[0] == "world"))
    lines: dict[tuple[str, tuple[int, ...]], list] = {key: [set(), 0, 0.0] for key in measured}
    for c in planned:
        op = "all_to_all" if c.op == "reduce_scatter" and c.ours else c.op  # as gloo's ranks do: see AsyncReduceScatter
        line = lines.setdefault((op, directions[c.over].ranks), [set(), 0, 0.0])
        line[0].add(c.over)
        line[1] += c.count
        line[2] += c.count * c.payload
    result = []
    for (op, ranks), (over, calls, payload) in lines.items():
        names = over or {name for name, group in directions.items() if group.ranks == ranks}
        label = ", ".join(name for name in directions if name in names) or "?"
        got = measured.get((op, ranks), [0, 0])
        pair = Messages(op, label, len(ranks), calls, payload), Messages(op, label, len(ranks), *got)
        result.append(Comparison(*pair))
    return tuple(sorted(result, key=lambda c: (c.planned.over, c.planned.op)))


class Recorder(TorchDispatchMode):
    """Collectives and living memory of what runs within it.

    Attributes:
        messages: (op, ranks of the group) -> [calls, bytes handed in, of gathers those returned].
        bytes: of the storages made within it that are alive.
        peak: the maximum of these, without gradients of parameters.
    """

    def __init__(self, model: torch.nn.Module | None = None):
        super().__init__()
        self.messages: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self.bytes = self.peak = self._gradients = 0
        parameters = [] if model is None else list(model.parameters())
        buffers = [] if model is None else list(model.buffers())
        self._known = {t.untyped_storage()._cdata for t in (*parameters, *buffers)}
        self._without_gradient: set[Tensor] = set(parameters)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._message(func._schema.name.partition("::")[2], args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count_storage(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes - self._gradients)
        return out

    def _message(self, name: str, args: tuple) -> None:
        if name not in OPS:
            raise RuntimeError(f"collective {name}: is not planned, or its bytes are not defined here")
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return
        counted = args[1] if name in ("_reduce_scatter_base_", "alltoall_base_") else args[0]
        line = self.messages.setdefault((OPS[name], ranks), [0, 0])
        line[0] += 1
        line[1] += sum(t.numel() * t.element_size() for t in tree_leaves(counted) if isinstance(t, Tensor))

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size

    def _count_gradient(self, parameter: Tensor) -> None:
        if parameter in self._without_gradient and parameter.grad is not None:
            self._without_gradient.remove(parameter)
            self._gradients += parameter.grad.untyped_storage().nbytes()


# ---- numbers of rows


def _give_counts(model: torch.nn.Module, shares_ME: Sequence[Sequence[float]] | None) -> list[_ExpertParallel]:
    """Gives each MoE layer a dispatcher that knows how many rows each expert gets; returns those that send rows."""
    sending = []
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, MoE)):
        dispatcher, E = layer.dispatcher, layer.config.num_experts
        shares = [1 / E] * E if shares_ME is None else shares_ME[number]
        if type(dispatcher) is Dispatcher:
            layer.dispatcher = _Local(E, dispatcher.region, dispatcher.expert_tp)
        elif type(dispatcher) is ExpertParallelDispatcher:
            layer.dispatcher = _ExpertParallel(E, dispatcher.group, dispatcher.region, dispatcher.expert_tp)
            sending.append(layer.dispatcher)
        else:
            continue  # equal parts, whose numbers of rows depend on no value
        placement = dispatcher.placement
        layer.dispatcher.place_experts(placement)
        slots = [0.0] * (placement.ep * placement.dispatch_slots)
        for rank in range(placement.ep):
            for slot, (expert, share) in placement.shares_of_rank(rank).items():
                slots[rank * placement.dispatch_slots + slot] = share * shares[expert]
        layer.dispatcher.shares = slots
    return sending


class _Counts(NamedTuple):
    """Takes the place of an `AsyncHostCopy`."""

    numbers: list

    def result(self) -> list:
        return self.numbers


class _Rows:
    """Rows that are sent as the real ones are, but whose counts on the host are given."""

    def __init__(self, rows: ArrangedRows, counts: str, numbers: list):
        self.rows, self.counts, self.numbers, self.dropped = rows, counts, numbers, None

    def send(self) -> DispatchedRows:
        sent: Any = self.rows.send()
        return sent._replace(**{self.counts: _Counts(self.numbers)})


class _Local(Dispatcher):
    shares: list[float]

    def arrange_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> ArrangedRows:
        rows = super().arrange_rows(rows_RD, expert_slot_R, max_rows)
        return _Rows(rows, "host_copy", list(accumulate(parts(rows_RD.shape[0], self.shares))))


class _ExpertParallel(ExpertParallelDispatcher):
    shares: list[float]
    sent: int
    received: int

    def arrange_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> Any:
        rows = super().arrange_rows(rows_RD, expert_slot_R, max_rows)
        sent, slots = parts(rows_RD.shape[0], self.shares), self.placement.dispatch_slots
        received = sent[self.group.rank * slots : (self.group.rank + 1) * slots]  # each rank of the group sends as many
        numbers = [[sum(sent[i * slots : (i + 1) * slots]), *received] for i in range(self.group.size)]
        self.sent, self.received = sum(sent), self.group.size * sum(received)
        return _Rows(rows, "host_counts", numbers)


def parts(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers with the given sum, as close to the shares as their running sums allow."""
    scale = sum(shares) or 1.0
    ends = [round(total * part / scale) for part in accumulate(shares)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
