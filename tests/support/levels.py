"""Which cases the quick level runs, those without the marker `full`, and which files of tests begin."""

from collections.abc import Collection, Hashable, Sequence, Set
from typing import Any

import pytest

# The files that take longest begin first. Those of hangs and of SLURM mostly wait: side by side they would leave
# processors idle, so files that compute stand between them.
LONGEST = (
    *("test_hangs.py", "test_equality.py", "test_killed_jobs.py", "test_compiled.py", "test_slurm.py"),
    *("test_documented_commands.py", "test_planned_memory.py", "test_layout_change.py", "test_stopped_jobs.py"),
    *("test_launches.py", "test_torchrun_nodes.py", "test_deepspeed_keys.py", "test_fuzz.py"),
)


def full(*values):
    """A case that only the full level runs."""
    return pytest.param(*values, marks=pytest.mark.full)


def full_unless(quick: Collection[int], cases: Sequence[Any]) -> list:
    """Cases of one value each: those whose numbers `quick` holds run at both levels."""
    return [pytest.param(case) if number in quick else full(case) for number, case in enumerate(cases)]


def covering(contents: Sequence[Set[Hashable]], costs: Sequence[float]) -> list[int]:
    """Numbers of cases that together have everything that any case has: `contents`, a set for each case.

    Greedy: the case with the most that is missing for its cost comes next, the first of equal ones.
    """
    missing = set().union(*contents)
    chosen = []
    while missing:
        best = max(range(len(contents)), key=lambda number: (len(contents[number] & missing) / costs[number], -number))
        chosen.append(best)
        missing -= contents[best]
    return sorted(chosen)
