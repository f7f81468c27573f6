"""The table of faults: rows of the tests that passed, each with its test; not written if any failed."""

from types import SimpleNamespace

import pytest
from support.fault_table import FaultTable, Rows


def item(name: str, *fixtures: str):
    return SimpleNamespace(nodeid=f"tests/{name}", fixturenames=fixtures, user_properties=[])


def report(of, when="call", passed=True, reason=None):
    outcome = {"passed": passed and reason is None, "skipped": reason is not None}
    longrepr = (f"tests/{of.nodeid}", 3, f"Skipped: {reason}") if reason else None
    return SimpleNamespace(
        nodeid=of.nodeid, when=when, user_properties=of.user_properties, longrepr=longrepr, **outcome
    )


@pytest.fixture
def table(tmp_path):
    """A table and the lines that it tells the terminal."""
    lines = []
    terminal = SimpleNamespace(write_line=lines.append)
    plugin = FaultTable(tmp_path / "faults.md")
    plugin.end = lambda status=0: plugin.pytest_terminal_summary(terminal, status)
    plugin.lines = lines
    return plugin


def test_only_tests_with_rows_run(table):
    left_out = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)))
    items = [item("a"), item("b", "tmp_path", "fault_table"), item("c", "tmp_path")]
    b = items[1]
    table.pytest_collection_modifyitems(config, items)
    assert items == [b] and [test.nodeid for test in left_out] == ["tests/a", "tests/c"]


def test_rows_of_passed_tests_are_written_with_their_tests_and_reasons(table):
    kill, cut = item("test_kill.py::test_kill[2 ranks]"), item("test_cut.py::test_cut[a]")
    Rows(kill).append(("kill -9", "resumed", "5 steps"))
    Rows(kill).append(("kill -9 of two", "resumed", "5 steps"))
    table.pytest_runtest_logreport(report(kill, when="setup"))
    table.pytest_runtest_logreport(report(kill))
    table.pytest_runtest_logreport(report(cut, when="setup", reason="no namespaces"))
    table.end()
    text = table.file.read_text()
    assert "| kill -9 | resumed | 5 steps | `tests/test_kill.py::test_kill` |\n" in text
    assert text.count("`tests/test_kill.py::test_kill`") == 2 and "make faults" in text
    assert "Not run on this machine:\n\n* `tests/test_cut.py::test_cut`: no namespaces\n" in text
    assert table.lines == [f"{table.file}: 2 faults"]


@pytest.mark.parametrize("status, rows", [(1, True), (0, False)], ids=["a test failed", "no rows"])
def test_a_table_that_would_lack_rows_is_not_written(status, rows, table):
    with_rows, other = item("test_a.py::test_a"), item("test_b.py::test_b")
    Rows(with_rows).append(("a", "b", "c"))
    table.pytest_runtest_logreport(report(with_rows))
    if rows:
        Rows(other).append(("a", "b", "c"))
    table.pytest_runtest_logreport(report(other))
    table.end(status)
    assert not table.file.exists() and "is not written" in table.lines[-1]
    assert rows or "no rows, though they ask for the table: tests/test_b.py::test_b" in table.lines[0]


def test_one_case_of_a_test_may_add_the_rows_of_all(table):
    first, second = item("test_a.py::test_a[1]"), item("test_a.py::test_a[2]")
    Rows(first).append(("a", "b", "c"))
    table.pytest_runtest_logreport(report(first))
    table.pytest_runtest_logreport(report(second))
    table.end()
    assert "| a | b | c | `tests/test_a.py::test_a` |\n" in table.file.read_text()
