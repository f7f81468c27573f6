"""What a scene can show, and which combinations training never shows.

A scene shows one or two groups of equal digits in one colour. Four kinds of combinations are held out of training. Each
word of a held-out combination occurs in training in other combinations:

    a colour and a digit            "a red five"                    12 of 60
    a count, 2 to 4, and a digit    "three ones"                     6 of 30
    two different digits            "a three and a four"             9 of 45
    two digits and their places     "a one above a zero"            28 of 144

The rules are arithmetic modulo 5, so that every digit and every colour has held-out combinations and seen ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

CANVAS, DIGIT = 16, 8  # pixels: sides of a scene and of a digit
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "purple": (0.75, 0.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}
COLOUR_NAMES = tuple(COLOURS)
OPPOSITE = {"above": "below", "left of": "right of", "below": "above", "right of": "left of"}
RELATIONS = tuple(OPPOSITE)
MAX_DIGITS = (CANVAS // DIGIT) ** 2


@dataclass(frozen=True)
class Group:
    """Equal digits of one colour.

    Attributes:
        count: number of digits, 1 to 4.
        digit: 0 to 9.
        colour: name of the colour; None if a description leaves it open.
    """

    count: int
    digit: int
    colour: str | None = None


@dataclass(frozen=True)
class Description:
    """What a scene shows, or what a caption states about it.

    Attributes:
        groups: one or two; two groups differ in digit or colour.
        relations: those of `RELATIONS` that hold between the first group and the second.
    """

    groups: tuple[Group, ...]
    relations: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of digits."""
        return sum(group.count for group in self.groups)

    def swapped(self) -> Description:
        """The same content with the groups in the other order."""
        return Description(self.groups[::-1], tuple(OPPOSITE[relation] for relation in self.relations))


def is_held_out_colour(colour: str, digit: int) -> bool:
    """Whether training never shows this digit in this colour."""
    return (digit - COLOUR_NAMES.index(colour)) % 5 == 0


def is_held_out_count(count: int, digit: int) -> bool:
    """Whether training never shows so many of this digit in one colour."""
    return count > 1 and (digit + 3 * count) % 5 == 0


def is_held_out_pair(first: int, second: int) -> bool:
    """Whether training never shows these two digits together."""
    return first != second and (first + second) % 5 == 2


def is_held_out_place(first: int, relation: str, second: int) -> bool:
    """Whether training never shows two digits in this relation, although it shows them together."""
    if relation in ("below", "right of"):
        first, relation, second = second, OPPOSITE[relation], first
    if first == second or is_held_out_pair(first, second):
        return False
    return (first + 2 * second + RELATIONS.index(relation)) % 5 == 1


def held_out_parts(shown: Description) -> list[str]:
    """The held-out combinations in a scene, each in words; empty for a scene that training may show.

    Args:
        shown: a complete description: with the colours of all groups and all relations that hold.
    """
    parts = []
    for group in shown.groups:
        if group.colour is not None and is_held_out_colour(group.colour, group.digit):
            parts.append(f"{group.colour} {group.digit}")
        if is_held_out_count(group.count, group.digit):
            parts.append(f"{group.count} of {group.digit}")
    if len(shown.groups) == 2:
        first, second = (group.digit for group in shown.groups)
        if is_held_out_pair(first, second):
            parts.append(f"{first} and {second}")
        parts += [f"{first} {r} {second}" for r in shown.relations if is_held_out_place(first, r, second)]
    return parts


def colour_combinations(held_out: bool) -> Iterator[tuple[str, int]]:
    """All (colour, digit) that are held out, or all others."""
    return ((c, d) for d in range(10) for c in COLOUR_NAMES if is_held_out_colour(c, d) == held_out)


def count_combinations(held_out: bool) -> Iterator[tuple[int, int]]:
    """All (count, digit), 2 to 4 of a digit, that are held out, or all others."""
    return ((n, d) for n in range(2, MAX_DIGITS + 1) for d in range(10) if is_held_out_count(n, d) == held_out)


def pair_combinations(held_out: bool) -> Iterator[tuple[int, int]]:
    """All pairs of different digits, the smaller first, that are held out, or all others."""
    return ((a, b) for a, b in combinations(range(10), 2) if is_held_out_pair(a, b) == held_out)


def place_combinations(held_out: bool) -> Iterator[tuple[int, str, int]]:
    """All (digit, relation, digit) that are held out, or those that training shows; each fact in both orders."""
    ordered = ((a, r, b) for a, b in permutations(range(10), 2) for r in RELATIONS if not is_held_out_pair(a, b))
    return ((a, r, b) for a, r, b in ordered if is_held_out_place(a, r, b) == held_out)
