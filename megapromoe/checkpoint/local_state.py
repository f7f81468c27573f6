"""One rank's part of a run's state: views of it in the engine's partitions, and a copy in host memory to be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapromoe.checkpoint.format import KINDS
from megapromoe.distributed.agreement import this_rank
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.engine.protocol import Piece


@dataclass
class LocalState:
    """A copy in host memory: entries of the rank's file, and which elements of which tensor they are."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: list[list] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def of_kinds(self, kinds: tuple[str, ...]) -> LocalState:
        """The entries of these kinds and the buffers; the tensors are shared."""
        wanted = (*kinds, "buffer")
        return LocalState({n: t for n, t in self.tensors.items() if n.partition("/")[0] in wanted}, self.parts)


def copy_to_host(engine: Engine, items: Iterable[tuple[str, Piece, Tensor]], buffers: dict[str, Tensor]) -> LocalState:
    """Copies this rank's `items` (kind, piece, flat tensor), of those held by several ranks only the first's."""
    state, seen = LocalState(), set()
    for kind, piece, tensor in items:
        if engine.is_writer(piece.name):
            copy = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())
            state.tensors[f"{kind}/{piece.name}@{piece.start}"] = copy
            if piece not in seen:
                seen.add(piece)
                state.parts.append([piece.name, piece.start, piece.stop, _view(engine, piece.name)])
    if this_rank() == 0:
        state.tensors |= {f"buffer/{name}": b.detach().cpu().clone() for name, b in buffers.items()}
    return state


def items_of(engine: Engine, ema: EMA, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, Piece, Tensor]]:
    """What this rank holds of some kinds, for `copy_to_host`."""
    for piece, tensors in held_pieces(engine, ema):
        for kind in kinds:
            yield kind, piece, tensors[kind]


def held_pieces(engine: Engine, ema: EMA) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    """Every piece this rank holds, with views of its master, moments and average."""
    for partition, average in zip(engine.partitions, ema.averages, strict=True):
        flats = {"master": partition.master, "ema": average, **engine.moments(partition)}
        for piece in partition.pieces:
            span = slice(piece.offset, piece.offset + piece.stop - piece.start)
            yield piece, {kind: flat[span] for kind, flat in flats.items()}


def _view(engine: Engine, name: str) -> list:
    """JSON of how this rank's slice lies in the logical tensor: [local shape, [[local, logical], ...]]."""
    layout = engine.layouts[name]
    pairs = [[[[s.start, s.stop] for s in region] for region in pair] for pair in layout.shard_slices(engine.mesh)]
    return [list(layout.local_shape(engine.mesh)), pairs]
