"""Whole matrices from flat partitions whose borders cut through them, and the results back.

ZeRO cuts the concatenated parameters of a group into equal parts, so a matrix may lie on two ranks or more; at stage 3
every parameter lies on all ranks of its group. Each matrix has one owner among the ranks that hold a part of it. One
all-to-all sends the parts of cut matrices to their owners, a second one brings the results back. Whole matrices are
not sent. Where the borders are is known in advance, so the host waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.engine.protocol import PartitionShards


class Matrix(NamedTuple):
    """A matrix (rows, columns) that begins at element `start` of a rank's flattened parameter `name`."""

    name: str
    start: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """What orthogonalising it costs, relative to others: its elements times its smaller dimension."""
        return self.size * min(self.rows, self.columns)


def matrices_of(layout: ParameterLayout, mesh: Mesh) -> tuple[Matrix, ...]:
    """The hidden matrices of a parameter on this rank, one for each expert and each matrix stacked in the rows.

    Spare expert slots are left out: they are zero and stay zero. Without tensor parallelism, which would divide them.
    """
    stacked = layout.hidden_matrices
    if not stacked:
        return ()
    experts, shape = 1, layout.shape
    if layout.expert:
        experts, shape = len(layout.placement(mesh).owned(mesh.ep.rank)), layout.shape[1:]
    rows, columns = shape[0] // stacked, math.prod(shape[1:])
    return tuple(Matrix(layout.name, i * rows * columns, rows, columns) for i in range(experts * stacked))


class _Part(NamedTuple):
    """Elements [first, first + size) of a matrix, at `offset` in the partition of rank `rank` of the group."""

    rank: int
    offset: int
    first: int
    size: int


class MatrixExchange:
    """Gathers the matrices of a partition and distributes results, the same way in every step.

    Attributes:
        matrices: all matrices of the group's partitions, in the same order on every rank.
        owners: the rank of the group that gathers each.
        owned: those of this rank.
    """

    def __init__(self, matrices: Sequence[Matrix], shards: PartitionShards):
        """Determines owners and messages; no communication.

        Args:
            matrices: of the parameters in the partitions.
            shards: which elements each rank of the group has.
        """
        self.matrices, self._shards = tuple(matrices), shards
        parts_of = _parts(self.matrices, shards)
        self.owners = _owners(self.matrices, parts_of)
        self._is_cut = any(len({part.rank for part in parts}) > 1 for parts in parts_of)
        rank, ranks = shards.rank, range(len(shards.pieces))
        self.owned: list[Matrix] = []
        self._own_parts: list[list[_Part]] = []
        self._outgoing: list[list[_Part]] = [[] for _ in ranks]
        self._incoming: list[list[tuple[int, _Part]]] = [[] for _ in ranks]
        self._held: list[tuple[Matrix, _Part]] = []
        for matrix, parts, owner in zip(self.matrices, parts_of, self.owners, strict=True):
            self._held += [(matrix, part) for part in parts if part.rank == rank]
            if owner == rank:
                for part in parts:
                    if part.rank != rank:
                        self._incoming[part.rank].append((len(self.owned), part))
                self.owned.append(matrix)
                self._own_parts.append([part for part in parts if part.rank == rank])
            else:
                self._outgoing[owner] += [part for part in parts if part.rank == rank]
        self._sent = [sum(part.size for part in parts) for parts in self._outgoing]
        self._received = [sum(part.size for _, part in parts) for parts in self._incoming]

    @property
    def sent_elements(self) -> int:
        """Elements of cut matrices that this rank sends to their owners, and gets back, in a step."""
        return sum(self._sent)

    @property
    def received_elements(self) -> int:
        """Elements that this rank, as an owner, gets from other ranks, and sends back, in a step."""
        return sum(self._received)

    def gather(self, flat: Tensor) -> list[Tensor]:
        """The owned matrices (rows, columns), in the order of `owned`. Collective over the group.

        Args:
            flat: this rank's partition; matrices that are not cut are returned as views of it.
        """
        gathered = [
            flat[parts[0].offset : parts[0].offset + matrix.size]
            if len(parts) == 1 and parts[0].size == matrix.size
            else flat.new_empty(matrix.size)
            for matrix, parts in zip(self.owned, self._own_parts, strict=True)
        ]
        if self._is_cut:
            for values, matrix, parts in zip(gathered, self.owned, self._own_parts, strict=True):
                for part in parts:
                    if part.size < matrix.size:
                        values[part.first : part.first + part.size] = flat[part.offset : part.offset + part.size]
            outgoing = [flat[p.offset : p.offset + p.size] for parts in self._outgoing for p in parts]
            received = self._exchange(_joined(outgoing, flat), self._sent, self._received)
            for (index, part), values in self._split_incoming(received):
                gathered[index][part.first : part.first + part.size] = values
        return [values.view(m.rows, m.columns) for values, m in zip(gathered, self.owned, strict=True)]

    def distribute(self, results: Sequence[Tensor], out: Tensor) -> None:
        """Writes results for the owned matrices into the partitions of the ranks that hold them. Collective.

        Args:
            results: (rows, columns) for each of `owned`.
            out: a flat tensor like this rank's partition; elements of no matrix are left as they are.
        """
        flats = [result.reshape(-1) for result in results]
        for values, parts in zip(flats, self._own_parts, strict=True):
            for part in parts:
                out[part.offset : part.offset + part.size] = values[part.first : part.first + part.size]
        if self._is_cut:
            outgoing = [flats[i][p.first : p.first + p.size] for parts in self._incoming for i, p in parts]
            received = self._exchange(_joined(outgoing, out), self._received, self._sent)
            parts = [part for parts in self._outgoing for part in parts]
            for part, values in zip(parts, received.split([part.size for part in parts]), strict=True):
                out[part.offset : part.offset + part.size] = values

    def held_parts(self, flat: Tensor) -> list[tuple[Matrix, Tensor]]:
        """The parts of matrices in this rank's partition, as views of a flat tensor like it."""
        return [(matrix, flat[part.offset : part.offset + part.size]) for matrix, part in self._held]

    def _exchange(self, outgoing: Tensor, sent: list[int], received: list[int]) -> Tensor:
        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self._shards.process_group)
        return incoming

    def _split_incoming(self, received: Tensor) -> list[tuple[tuple[int, _Part], Tensor]]:
        entries = [entry for parts in self._incoming for entry in parts]
        return list(zip(entries, received.split([part.size for _, part in entries]), strict=True))


def _joined(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tensors) if tensors else like.new_empty(0)


def _parts(matrices: Sequence[Matrix], shards: PartitionShards) -> list[list[_Part]]:
    """The parts of each matrix, by ascending first element."""
    pieces_of: dict[str, list] = {}
    for rank, pieces in enumerate(shards.pieces):
        for piece in pieces:
            pieces_of.setdefault(piece.name, []).append((rank, piece))
    parts_of = []
    for matrix in matrices:
        begin, end, parts = matrix.start, matrix.start + matrix.size, []
        for rank, piece in pieces_of.get(matrix.name, ()):
            start, stop = max(begin, piece.start), min(end, piece.stop)
            if start < stop:
                parts.append(_Part(rank, piece.offset + start - piece.start, start - begin, stop - start))
        parts_of.append(sorted(parts, key=lambda part: part.first))
    return parts_of


def _owners(matrices: Sequence[Matrix], parts_of: Sequence[Sequence[_Part]]) -> tuple[int, ...]:
    """The owner of each matrix: who holds all of it; of a cut one the rank, of its holders, with the least to do."""
    load: dict[int, int] = {}
    owners = []
    for matrix, parts in zip(matrices, parts_of, strict=True):
        if len(ranks := {part.rank for part in parts}) == 1:
            load[parts[0].rank] = load.get(parts[0].rank, 0) + matrix.cost
        assert ranks, f"{matrix.name}: no rank of the group has elements of the matrix at {matrix.start}"
    for matrix, parts in zip(matrices, parts_of, strict=True):
        ranks = {part.rank for part in parts}
        owner = min(ranks, key=lambda rank: (load.get(rank, 0), rank))
        if len(ranks) > 1:
            load[owner] = load.get(owner, 0) + matrix.cost
        owners.append(owner)
    return tuple(owners)
