"""The tests themselves: their layout, and the choice of cases for the quick level."""

import ast
from pathlib import Path
from random import Random

from support.levels import LONGEST, pairwise

TESTS = Path(__file__).parents[1]


def imported(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_test_imports_another():
    """What tests share is in tests/support/ and in conftest.py files."""
    tests = {file.stem for file in TESTS.rglob("test_*.py")}
    assert len(tests) == len(list(TESTS.rglob("test_*.py"))) > 50, "two files of tests have one name"
    imports = [(file.name, name) for file in sorted(TESTS.rglob("*.py")) for name in imported(file)]
    assert not [(file, name) for file, name in imports if tests & set(name.split("."))]


def test_the_longest_files_exist():
    assert set(LONGEST) <= {file.name for file in TESTS.rglob("test_*.py")}


def test_pairwise_has_every_pair_in_fewer_cases():
    random = Random(0)
    cases = [{f"f{i}": random.choice("abc"[: 2 + i % 2]) for i in range(6)} for _ in range(200)]
    cases.append({"f0": "a", "alone": 1})
    chosen = pairwise(cases)
    assert chosen == pairwise(cases) and len(chosen) < 30 and len(cases) - 1 in chosen

    def pairs(numbers) -> set[tuple]:
        names = [f"f{i}" for i in range(6)] + ["alone"]
        return {(a, cases[n].get(a), b, cases[n].get(b)) for n in numbers for a in names for b in names if a < b}

    assert pairs(chosen) == pairs(range(len(cases)))
