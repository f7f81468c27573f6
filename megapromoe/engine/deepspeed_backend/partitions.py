"""The partitions of ZeRO's optimizers: their masters, their gradients, and the parameters that are set from them.

`zero` is the optimizer wrapper of DeepSpeed's engine, `stage` its ZeRO stage. At stage 0 the wrapper is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.engine.protocol import Partition, PartitionShards, Piece
from megapromoe.nn.dit import DiT

GATHERED = 1 << 22  # elements that one collective gathers when parameters are set from masters


def make_partitions(
    stage: int, zero: Any, model: DiT, hidden: Collection[str], uses_muon: Callable[[int], bool]
) -> Iterator[Partition]:
    """The partitions of this rank, in the order of the optimizer's parameter groups (stage 3: sub-groups).

    Args:
        hidden: the names of the parameters that Muon updates.
        uses_muon: of the number of a partition, at stages 1 to 3, whether it consists of such parameters.
    """
    if stage == 0:
        for name, p in model.named_parameters():
            piece = Piece(name, 0, p.numel(), 0)
            yield Partition(p.data.view(-1), (piece,), optimized=p, uses_muon=name in hidden)
        return
    names = {id(p): name for name, p in model.named_parameters()}
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for number, master in enumerate(masters):
        pieces = tuple(_pieces(stage, zero, names, number, dist.get_rank(_process_group(stage, zero, number))))
        yield Partition(master, pieces, optimized=master, uses_muon=uses_muon(number))


def shards_of(stage: int, zero: Any, model: DiT, number: int, partition: Partition) -> PartitionShards:
    """The partitions with this number on all ranks that share its parameters."""
    if stage == 0:
        return PartitionShards(None, 0, (partition.pieces,))
    names = {id(p): name for name, p in model.named_parameters()}
    group = _process_group(stage, zero, number)
    ranks = range(dist.get_world_size(group))
    pieces = tuple(tuple(_pieces(stage, zero, names, number, rank)) for rank in ranks)
    return PartitionShards(group, dist.get_rank(group), pieces)


def _process_group(stage: int, zero: Any, number: int) -> dist.ProcessGroup:
    """The ranks over which the parameters of partition `number` are divided, at stages 1 to 3."""
    if stage < 3:
        return zero.real_dp_process_group[number]
    p = zero.fp16_groups[number][0]
    return p.ds_process_group


def _pieces(stage: int, zero: Any, names: dict[int, str], number: int, rank: int) -> Iterator[Piece]:
    """The pieces of partition `number` on a rank of its group, at stages 1 to 3."""
    if stage == 3:
        # Each parameter is padded to a multiple of the number of ranks and sharded; the shards of a sub-group are
        # contiguous in its partition.
        offset = 0
        for p in zero.fp16_groups[number]:
            width = p.partition_numel()
            start = min(rank * width, p.ds_numel)
            yield Piece(names[id(p)], start, min(start + width, p.ds_numel), offset)
            offset += width
        return
    # The parameters of a group are contiguous, with padding for alignment, and split into equal partitions.
    width = zero.partition_size[number]
    first = rank * width
    parameters, offsets = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number]
    for p, begin in zip(parameters, offsets, strict=True):
        start, stop = max(first - begin, 0), min(first + width - begin, p.numel())
        if start < stop:
            yield Piece(names[id(p)], start, stop, begin + start - first)


def gradients_of(stage: int, zero: Any, number: int, partition: Partition) -> list[Tensor]:
    """The flattened gradient of each piece of the partition with this number; see `ShardedBackend.gradients`."""
    pieces = partition.pieces
    if stage == 0:
        gradient = partition.optimized.grad
        assert gradient is not None, f"no gradient of {pieces[0].name}: every parameter must be used in every step"
        return [gradient.view(-1)]
    if stage < 3 and zero.cpu_offload:
        # 0.19.8 has copied the gradients into that of the master partition, on the host.
        flat = partition.master.grad
        assert flat is not None, "DeepSpeed made no gradient of an offloaded partition"
        return [flat[p.offset : p.offset + p.stop - p.start] for p in pieces]
    # 0.19.8 keeps a list for each parameter group (stage 3: sub-group), in the order of its parameters. Padding
    # between parameters is marked, padding at the end of the last partition is not.
    kept = [g.view(-1) for g in zero.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
    return kept[: len(pieces)]


@torch.no_grad()
def sync_parameters_from_masters(stage: int, zero: Any, partitions: Sequence[Partition]) -> None:
    """Sets the parameters to the values of the masters. Collective."""
    if stage == 0:
        return
    if stage == 3:
        # As `step` of 0.19.8 does around the optimizer. Small parameters are kept gathered, and `all_gather` leaves
        # out those that are gathered already.
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        return
    # The bf16 parameters of a group are views of one flat tensor; `shards` are its parts by data-parallel rank.
    for number, partition in enumerate(partitions):
        group = zero.real_dp_process_group[number]
        shards = zero.parallel_partitioned_bit16_groups[number]
        shard = shards[dist.get_rank(group)]
        shard.copy_(partition.master)
        size = max(GATHERED // len(shards), 1)
        for start in range(0, shard.numel(), size):  # gloo and NCCL keep a copy of what one call gathers
            part = slice(start, start + size)
            dist.all_gather([other[part] for other in shards], shard[part].clone(), group=group)


def replace_norm(stage: int, zero: Any, norm: Callable[[], Tensor]) -> None:
    """Replaces DeepSpeed's gradient norm by `norm`, and turns off its overflow scan.

    `step` of 0.19.8 clips by the value that these methods return, and skips the update if it is -1. Its own norm
    counts experts wrongly with tensor parallelism. Its overflow scan reads every gradient again, and would skip the
    norm after an overflow.
    """
    if stage == 3:
        zero._get_norm_groups = lambda: [norm()]
    elif stage:
        zero.scaled_global_norm = lambda *_: norm()
        zero.check_overflow = lambda **_: None
