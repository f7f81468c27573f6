"""Whole routes of fixed tokens: the expert of each token at some steps of a run, read and compared.

`megapromoe routing trace --routes` writes them to routes.jsonl, a line with a checksum for each step, as in
`routing_trace.py`. Tokens are fixed: all steps have the same images, noise, noise levels and conditions, and only the
weights of the model differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapromoe.errors import UserError
from megapromoe.io import write_bytes
from megapromoe.routing_trace import are_naturals, checked_line, checked_values, packed, unpacked

ROUTES_FILE = "routes.jsonl"
_KEYS = ("step", "weights", "blocks", "levels", "images", "experts", "tokens", "routes")


class RoutesError(UserError):
    """A file of routes that cannot be read, is damaged, or does not fit what it is used for."""


@dataclass(frozen=True)
class FixedTokens:
    """Which tokens are routed, and by what.

    Attributes:
        weights: "ema", "ema=DECAY" or "master".
        blocks: the block of each of the L MoE layers.
        levels: the M noise levels, as quantiles of those of the training.
        images: the N images, as numbers in the data set.
        experts: number of experts E.
        tokens: number of tokens S of an image.
    """

    weights: str
    blocks: tuple[int, ...]
    levels: tuple[float, ...]
    images: tuple[int, ...]
    experts: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(L, M, N, S)."""
        return len(self.blocks), len(self.levels), len(self.images), self.tokens


@dataclass(frozen=True)
class Routes:
    """The routes of fixed tokens at a step.

    Attributes:
        step: step of the weights.
        of: the tokens.
        expert_LMNS: the expert with the largest routing weight of each token; -1: none, as in expert choice.
    """

    step: int
    of: FixedTokens
    expert_LMNS: np.ndarray


def changed_share(earlier: Routes, later: Routes) -> np.ndarray:
    """The drift of each layer between two steps, (L,): the share of the tokens whose expert differs.

    A token is an image, a noise level and a position. It counts as changed if the expert with its largest routing
    weight is another, and if it has an expert at only one of the steps.

    Raises RoutesError if the tokens are not the same.
    """
    if earlier.of != later.of:
        raise RoutesError(
            f"the routes of step {earlier.step} are of other tokens, layers or weights than those of step {later.step};"
            " record both with one command: megapromoe routing trace --routes"
        )
    return (earlier.expert_LMNS != later.expert_LMNS).mean((1, 2, 3))


def write_routes(file: Path, routes: Sequence[Routes]) -> None:
    """Writes a file of routes, replacing it. Raises OSError."""
    lines = []
    for recording in routes:
        of = recording.of
        values = {"step": recording.step, "weights": of.weights, "blocks": of.blocks, "levels": of.levels}
        values |= {"images": of.images, "experts": of.experts, "tokens": of.tokens}
        lines.append(checked_line(values | {"routes": packed(recording.expert_LMNS + 1, "<u2")}))
    write_bytes(file, b"".join(lines), parents=True)


def read_routes(file: Path) -> list[Routes]:
    """The routes of all steps of a file, ascending. Raises RoutesError if it cannot be read or is damaged."""
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RoutesError(
            f"{file}: cannot be read ({error.strerror or error}); megapromoe routing trace --routes writes this file"
        ) from error
    routes: list[Routes] = []
    for number, line in enumerate(lines, 1):
        try:
            recording = _decode(line)
            if routes and (routes[-1].of != recording.of or routes[-1].step >= recording.step):
                raise ValueError("its tokens or its step do not fit the line before")
        except ValueError as error:
            raise RoutesError(
                f"{file}, line {number}: is damaged: {error}; write it again: megapromoe routing trace --routes"
            ) from error
        routes.append(recording)
    if not routes:
        raise RoutesError(f"{file}: is empty; write it again: megapromoe routing trace --routes")
    return routes


def _decode(line: bytes) -> Routes:
    step, weights, blocks, levels, images, experts, tokens, text = checked_values(line, _KEYS)
    if not are_naturals([step, experts, tokens], blocks, images) or not isinstance(weights, str):
        raise ValueError("its numbers are not natural numbers")
    if not isinstance(levels, list) or not all(type(level) is float and 0 < level < 1 for level in levels):
        raise ValueError("its noise levels are not between 0 and 1")
    if not (blocks and levels and images and tokens and experts) or not isinstance(text, str):
        raise ValueError("its sizes do not fit each other")
    of = FixedTokens(weights, tuple(blocks), tuple(levels), tuple(images), experts, tokens)
    expert_LMNS = unpacked(text, "<u2", of.shape).astype(np.int64) - 1
    if expert_LMNS.max() >= experts:
        raise ValueError(f"it has the expert {expert_LMNS.max()} of {experts}")
    return Routes(step, of, expert_LMNS)
