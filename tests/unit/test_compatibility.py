"""The claimed versions are those whose tests passed, and how a row comes into that table."""

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support import compatibility
from support.compatibility import COLUMNS, COMPLETE, TESTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLAIMS = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}


def tried(column: str) -> list[Version]:
    """The versions of the table, in order, without the build ("+cpu")."""
    return sorted({Version(Version(row[column]).public) for row in compatibility.rows(PAGE)})


def neighbours(version: Version) -> tuple[str, str]:
    """The releases before and after, by their second number: 2.13.1 -> 2.12.99, 2.14.0."""
    major, minor, *_ = version.release
    return f"{major}.{minor - 1}.99", f"{major}.{minor + 1}.0"


def test_every_row_passed():
    for row in compatibility.rows(PAGE):
        assert row["failed"] == "0" and int(row["passed"]) > 150, row


def test_torch_is_claimed_from_the_lowest_to_the_newest_that_passed():
    lowest, newest = tried("torch")[0], tried("torch")[-1]
    claim = CLAIMS["torch"]
    assert all(version in claim for version in tried("torch"))
    assert neighbours(lowest)[0] not in claim and neighbours(newest)[1] not in claim


def test_deepspeed_is_claimed_where_it_passed():
    assert CLAIMS["deepspeed"] == SpecifierSet(",".join(f"=={version}" for version in tried("DeepSpeed")))


def test_python_is_claimed_from_the_lowest_that_passed():
    lowest = tried("Python")[0]
    assert PROJECT["requires-python"] == f">={lowest.major}.{lowest.minor}"


def test_the_pinned_versions_passed():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert any(
        (Version(row["torch"]).public, row["DeepSpeed"]) == (pinned["torch"], pinned["deepspeed"])
        for row in compatibility.rows(PAGE)
    )


def test_the_chosen_tests_exist():
    assert [name for name in TESTS if not (ROOT / "tests" / name).is_file()] == []
    assert set(COMPLETE) <= set(TESTS) and len(set(TESTS)) == len(TESTS)


HEAD = f"Some words.\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
OLD = ("2.11.0+cu126", "0.19.8", "3.11.7", "2026-01-01", "300", "1<br>`a.py::b[x \\| y]`", "2", "0")
NEW = ("2.11.0+cu126", "0.19.8", "3.11.7", "2026-02-01", "301", "0", "2", "1")
OTHER = ("2.9.1+cpu", "0.19.8", "3.11.7", "2026-01-02", "301", "0", "2", "0")


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def test_a_row_replaces_that_of_the_same_versions_and_no_other():
    page = compatibility.with_row(HEAD + "\nMore words.\n", OLD)
    assert page == HEAD + line(OLD) + "\nMore words.\n"
    assert compatibility.rows(page) == [dict(zip(COLUMNS, OLD, strict=True))]
    page = compatibility.with_row(page, OTHER)
    assert page == HEAD + line(OTHER) + line(OLD) + "\nMore words.\n", "rows are not in the order of versions"
    assert compatibility.with_row(page, NEW) == HEAD + line(OTHER) + line(NEW) + "\nMore words.\n"


def test_a_row_counts_outcomes_and_names_failures():
    cells = compatibility.row({"tests/a.py::b[x|y]": "failed", "c": "passed", "d": "passed", "e": "skipped"}, 3)
    assert cells[4:] == ("2", "1<br>`a.py::b[x\\|y]`", "1", "3")
    assert cells[0].startswith(str(Version(cells[0])))


class Cache(dict):
    """As pytest's, which keeps values between sessions."""

    set = dict.__setitem__


def session(
    cache: Cache, page: Path, repeats: bool, outcomes: dict[str, tuple[str, ...]], status: int, keyword: str = ""
) -> None:
    """One session of pytest with these outcomes of set-up, call and tear-down."""
    options = {"lf": repeats, "keyword": keyword, "markexpr": ""}
    config = SimpleNamespace(getoption=lambda name, *default: options[name], cache=cache)
    plugin = compatibility.Compatibility(config, page)
    for test, phases in outcomes.items():
        for outcome in phases:
            report = SimpleNamespace(nodeid=test, outcome=outcome)
            plugin.pytest_runtest_logreport(
                SimpleNamespace(**vars(report), **{o: o == outcome for o in ("passed", "failed", "skipped")})
            )
    plugin.pytest_sessionfinish(None, status)


def test_a_second_try_updates_the_row(tmp_path):
    cache, page = Cache(), tmp_path / "page.md"
    page.write_text(HEAD)
    passed, late, skipped = ("passed",) * 3, ("passed", "passed", "failed"), ("skipped", "passed")
    first = {"a": passed, "b": ("passed", "failed", "passed"), "c": late, "d": skipped}

    def counts() -> list[str]:
        (row,) = compatibility.rows(page.read_text())
        return [row[column] for column in COLUMNS[4:]]

    session(cache, page, False, first, pytest.ExitCode.TESTS_FAILED)
    assert counts() == ["1", "2<br>`b`<br>`c`", "1", "0"]
    session(cache, page, True, {"b": passed, "c": late}, pytest.ExitCode.TESTS_FAILED)
    assert counts() == ["2", "1<br>`c`", "1", "2"]
    session(cache, page, True, {"c": passed}, pytest.ExitCode.INTERRUPTED)
    assert counts()[1] == "1<br>`c`", "a session that was cut short says nothing"
    session(cache, page, False, {"c": passed}, pytest.ExitCode.OK, keyword="c")
    assert counts()[1] == "1<br>`c`", "a session of some of the tests says nothing"
    session(cache, page, True, {"c": passed}, pytest.ExitCode.OK)
    assert counts()[:2] == ["3", "0"]
