"""The training state on one rank: views of the engine's partitions, and their copy in host memory for saving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapromoe.checkpoint.weights import average_kinds
from megapromoe.distributed.agreement import this_rank
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.engine.protocol import Piece


@dataclass
class LocalState:
    """The state that one rank saves, or a copy of it in host memory.

    Attributes:
        tensors: entries of the rank's file, see `format.write_rank`.
        parts: [name, start, stop, view] for each piece: the elements of the full tensors that the entries contain.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: list[list] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def select_kinds(self, kinds: tuple[str, ...]) -> LocalState:
        """The entries of these kinds and the buffers, without a copy of the tensors."""
        wanted = (*kinds, "buffer")
        return LocalState({n: t for n, t in self.tensors.items() if n.partition("/")[0] in wanted}, self.parts)


def copy_to_host(engine: Engine, items: Iterable[tuple[str, Piece, Tensor]], buffers: dict[str, Tensor]) -> LocalState:
    """Copies the state that this rank saves to host memory, as float32. Arguments as those of `view_state`."""
    state = view_state(engine, items, buffers)
    for name, tensor in state.tensors.items():
        state.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return state


def view_state(engine: Engine, items: Iterable[tuple[str, Piece, Tensor]], buffers: dict[str, Tensor]) -> LocalState:
    """The state that this rank saves, as float32, without a copy of it: it must not change before it is written.

    Args:
        items: (kind, piece, flat tensor), see `local_tensors`. Of the ranks that hold a piece, the first has it.
        buffers: persistent buffers of the model; rank 0 has them.
    """
    state, listed_pieces = LocalState(), set()
    for kind, piece, tensor in items:
        if engine.is_writer(piece.name):
            state.tensors[f"{kind}/{piece.name}@{piece.start}"] = tensor.detach().float()
            if piece not in listed_pieces:
                listed_pieces.add(piece)
                state.parts.append([piece.name, piece.start, piece.stop, _view(engine, piece.name)])
    if this_rank() == 0:
        state.tensors |= {f"buffer/{name}": buffer.detach() for name, buffer in buffers.items()}
    return state


def local_tensors(engine: Engine, ema: EMA, kinds: tuple[str, ...]) -> Iterator[tuple[str, Piece, Tensor]]:
    """Yields (kind, piece, flat tensor) for all pieces on this rank and those of the kinds that each has."""
    for piece, tensors in local_pieces(engine, ema):
        for kind in kinds:
            if kind in tensors:
                yield kind, piece, tensors[kind]


def local_pieces(engine: Engine, ema: EMA) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    """Yields each piece on this rank with views (flat, fp32) of its master weight, moments and averages, by kind."""
    kinds = average_kinds(ema.decays)
    for partition, *averages in zip(engine.partitions, *ema.averages, strict=True):
        flats = {"master": partition.master, **dict(zip(kinds, averages, strict=True)), **engine.moments(partition)}
        for piece in partition.pieces:
            span = slice(piece.offset, piece.offset + piece.stop - piece.start)
            yield piece, {kind: flat[span] for kind, flat in flats.items()}


def _view(engine: Engine, name: str) -> list:
    """How this rank's shard maps to the full tensor, for JSON: [local shape, [[local region, logical region], ...]]."""
    layout = engine.layouts[name]
    pairs = [[[[s.start, s.stop] for s in region] for region in pair] for pair in layout.shard_slices(engine.mesh)]
    return [list(layout.local_shape(engine.mesh)), pairs]
