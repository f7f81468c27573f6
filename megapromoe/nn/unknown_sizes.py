"""Sizes that data decides, in compiled code.

Data decides the number of conditional images, of rows, and, in a tensor-parallel region, of the first token. Such a
number enters a graph as the length of a tensor, which the compiler does not know (torch: *unbacked*), so the same code
runs for every number, also for 0 and 1. A graph states which lengths are equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapromoe.nn.moe.layer import MoE


class Sizes(NamedTuple):
    """Numbers that data decides, as the lengths of tensors."""

    conditional: Tensor
    """Conditional images."""
    share: tuple[Tensor, Tensor] | None = None
    """In a tensor-parallel region that divides rows: which of them are of this rank, see `TokenAssignment.share`."""


def conditional_images(number: int, images: int) -> Tensor:
    """A tensor whose length, at most `images`, compiled code does not know."""
    return of_unknown_size(number, typical_images(images))


def typical_images(images: int) -> int:
    """The number of conditional images for which the compiler chooses the blocks of its kernels.

    Without one it takes the largest, so that the null images would be none: it then handles their elements one by one,
    or divides by zero (torch 2.11).
    """
    return max(images - max(images // 8, 1), 1)


def of_unknown_size(size: int, typical: int) -> Tensor:
    """A tensor whose length compiled code does not know; `typical`: as `typical_images`."""
    return unknown_size(torch.empty(size), typical)


def unknown_size(tensor: Tensor, typical: int) -> Tensor:
    """The tensor, of whose length compiled code knows nothing."""
    torch._dynamo.decorators.mark_unbacked(tensor, 0, hint_override=max(typical, 1))
    return tensor


def unknown_rows(record: Any, typical: int) -> Any:
    """A named tuple for compiled code: rows, by the names of its fields, get unknown sizes; lists become tensors."""
    for name, value in zip(record._fields, record, strict=True):
        if isinstance(value, list):
            record = record._replace(**{name: torch.tensor(value, dtype=torch.int32)})
        elif isinstance(value, Tensor) and name.endswith(("_R", "_RD")):
            if not value.requires_grad:  # not a view, of whose base the size would be known
                record = record._replace(**{name: value.detach()})
            unknown_size(getattr(record, name), typical)
    return record


def routed_tokens(moe: MoE, shape: torch.Size, sizes: Sizes) -> int:
    """In a graph: the number of tokens that are routed, of (B, S, D)."""
    B, S, _ = shape
    torch._check(sizes.conditional.shape[0] <= B)
    return S * (B if moe.unconditional is None else sizes.conditional.shape[0])


def check_rows(record: Any, num_rows: int) -> None:
    """In a graph: states how many rows a named tuple has that enters it."""
    for name, value in zip(record._fields, record, strict=True):
        if isinstance(value, Tensor) and name.endswith(("_R", "_RD")):
            torch._check(value.shape[0] == num_rows)


def typical_rows(moe: MoE, h_BSD: Tensor) -> int:
    """The number of rows of a rank for which the compiler chooses the blocks of its kernels."""
    B, S, _ = h_BSD.shape
    shards = moe.region.size if moe.dispatcher.divides_rows else 1
    return (typical_images(B) if moe.unconditional is not None else B) * S * moe.config.top_k // shards
