"""`make compat`: the tests that decide which versions the package claims, and their row in docs/compatibility.md.

A pytest plugin, which tests/conftest.py registers for `--compatibility-table FILE`. It collects the files in `TESTS`
alone, at the quick level (those in `COMPLETE` at both levels), and writes one row for this combination of torch,
DeepSpeed and Python in place of the row before. A run with `--last-failed` repeats the failures of the run before,
one at a time, and updates that row: a test that only ran into a time limit passes then.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from megapromoe.versions import versions

FOLDER = Path(__file__).parents[1]

# The model, its layouts, the engine, checkpoints, compilation.
TESTS = (
    "unit/test_golden.py",
    "unit/test_guided_routers.py",
    "unit/test_layout.py",
    "unit/test_routers.py",
    "unit/test_checkpoint_manifest.py",
    "unit/test_conversion.py",
    "parallel/test_compiled.py",
    "parallel/test_conversion_resumes.py",
    "parallel/test_counts.py",
    "parallel/test_dispatch.py",
    "parallel/test_engine.py",
    "parallel/test_equality.py",
    "parallel/test_layout_change.py",
    "parallel/test_processes.py",
    "parallel/test_published_run.py",
    "parallel/test_recompute.py",
    "parallel/test_running_centroids.py",
    "parallel/test_sampling.py",
    "parallel/test_static_dispatch.py",
    "parallel/test_training.py",
)
# Files whose tests of the full level run too.
COMPLETE = ("parallel/test_compiled.py", "parallel/test_recompute.py")

COLUMNS = ("torch", "DeepSpeed", "Python", "date", "passed", "failed", "skipped", "second try")
_KEYS = 3  # columns that say which row it is
_OUTCOMES = "compatibility/outcomes"  # in pytest's cache: test -> outcome, of the last complete run


class Compatibility:
    """Chooses the tests, counts their outcomes, and writes the row at the end of the session."""

    def __init__(self, config: pytest.Config, table: Path):
        self.config, self.table = config, table
        self.repeats = bool(config.getoption("lf", False))
        self.selects = bool(config.getoption("keyword") or config.getoption("markexpr"))  # -k, -m: not all tests
        self.outcomes: dict[str, str] = {}

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leaves out the other files of tests."""
        is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
        return True if is_test and _name(collection_path) not in TESTS else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out the full level of the files that are not in `COMPLETE`."""
        left_out = [i for i in items if i.get_closest_marker("full") and _name(i.path) not in COMPLETE]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records the worst outcome of a test's phases; reports of worker processes arrive one after the other."""
        before = self.outcomes.get(report.nodeid)
        if report.failed or before is None or (report.skipped and before != "failed"):
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Writes the row, unless this is a worker process, or not all chosen tests were run."""
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not self.selects
        if hasattr(self.config, "workerinput") or not complete or not self.outcomes:
            return
        cache, repeated = self.config.cache, 0
        assert cache is not None, "--compatibility-table needs pytest's cache: leave out -p no:cacheprovider"
        if self.repeats:
            repeated, self.outcomes = len(self.outcomes), cache.get(_OUTCOMES, {}) | self.outcomes
        cache.set(_OUTCOMES, self.outcomes)
        self.table.write_text(with_row(self.table.read_text(), row(self.outcomes, repeated)))


def row(outcomes: Mapping[str, str], repeated: int) -> tuple[str, ...]:
    """The cells of this environment, in the order of `COLUMNS`.

    Args:
        outcomes: test -> "passed", "failed" or "skipped".
        repeated: how many of them have their outcome from a second try, alone.
    """
    installed, count = versions(("torch", "deepspeed")), Counter(outcomes.values())
    failures = sorted(test.removeprefix("tests/") for test, outcome in outcomes.items() if outcome == "failed")
    failed = "<br>".join((str(len(failures)), *(f"`{test}`" for test in failures)))
    today = datetime.now(UTC).date().isoformat()
    environment = (installed["torch"], installed["deepspeed"], platform.python_version(), today)
    return (*environment, str(count["passed"]), failed.replace("|", "\\|"), str(count["skipped"]), str(repeated))


def with_row(page: str, cells: tuple[str, ...]) -> str:
    """The page with this row in its table, in place of the row of the same versions; rows are sorted by version."""
    before, rows, after = _split(page)
    by_key = {key[:_KEYS]: key for key in (*rows, cells)}
    ordered = sorted(by_key.values(), key=lambda r: [[int(n) for n in re.findall(r"\d+", cell)] for cell in r[:_KEYS]])
    return "\n".join((*before, *(f"| {' | '.join(r)} |" for r in ordered), *after)) + "\n"


def rows(page: str) -> list[dict[str, str]]:
    """The rows of the page's table, by the names of the columns."""
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in _split(page)[1]]


def _split(page: str) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """The lines up to the table's first row, the cells of its rows, and the lines after it."""
    lines = page.splitlines()
    start = lines.index(f"| {' | '.join(COLUMNS)} |") + 2
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
    cells = [tuple(line[2:-2].split(" | ")) for line in lines[start:end]]
    return lines[:start], cells, lines[end:]


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix() if path.is_relative_to(FOLDER) else ""
