"""Which cases of a matrix the quick level runs: every value of every factor with every value of every other."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def pairs_of(factors: Mapping[str, Hashable]) -> set[tuple]:
    """All pairs of (factor, value) of a case."""
    return set(combinations(sorted(factors.items(), key=str), 2))


def pairwise(cases: Sequence[Mapping[str, Hashable]], cost=lambda number: 1.0) -> list[int]:
    """Numbers of cases in which all pairs of (factor, value) that the cases have occur.

    Greedy: the case with the most new pairs for its cost comes next, of equal ones the first.
    """
    left = [pairs_of(factors) for factors in cases]
    missing: set[tuple] = set().union(*left)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(left[number] & missing) / cost(number), -number))
        chosen.append(best)
        missing -= left[best]
    return sorted(chosen)


def full_unless(quick, cases: Sequence[Any]) -> list:
    """The cases as parameters of a test: those whose numbers `quick` holds run at the quick level, all at the full."""
    return [
        pytest.param(case) if number in quick else pytest.param(case, marks=pytest.mark.full)
        for number, case in enumerate(cases)
    ]
