"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(lines: Sequence[Iterable[Any]]) -> str:
    """A table; the first line is its head."""
    head, *body = [[str(cell) for cell in line] for line in lines]
    return "\n".join(map(row, [head, ["---"] * len(head), *body]))


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
