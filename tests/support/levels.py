"""Which cases the quick level runs, those without the marker `full`, and which files of tests begin."""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

# The files that take longest begin first. Those of hangs and of SLURM mostly wait: side by side they would leave
# processors idle, so files that compute stand between them.
LONGEST = (
    *("test_hangs.py", "test_equality.py", "test_killed_jobs.py", "test_compiled.py", "test_slurm.py"),
    *("test_stopped_jobs.py", "test_documented_commands.py", "test_planned_memory.py", "test_launches.py"),
    *("test_deepspeed_keys.py", "test_fuzz.py", "test_layout_change.py"),
)


def full(*values):
    """A case that only the full level runs."""
    return pytest.param(*values, marks=pytest.mark.full)


def full_unless(quick: Collection[int], cases: Sequence[Any]) -> list:
    """Cases of one value each: those whose numbers `quick` holds run at both levels."""
    return [pytest.param(case) if number in quick else full(case) for number, case in enumerate(cases)]


def factors_of(overrides: Iterable[str], **more: Hashable) -> dict[str, Hashable]:
    """Factors of a case: its options, written as section.key=value, and others."""
    return dict(word.split("=", 1) for word in overrides) | more


def pairs_of(factors: Mapping[str, Hashable]) -> set[tuple]:
    """All pairs of two factors with their values."""
    return set(combinations(sorted(factors.items(), key=str), 2))


def pairwise(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Numbers of cases that have every pair of two factors with their values which any case has.

    Greedy: the case with the most pairs that are missing comes next, the first of equal ones. A factor that a case
    lacks has the value None.
    """
    names = sorted({name for factors in cases for name in factors})
    pairs = [pairs_of({name: factors.get(name) for name in names}) for factors in cases]
    missing: set[tuple] = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(pairs[number] & missing), -number))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
