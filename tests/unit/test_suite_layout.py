"""The tests themselves: their layout, and the choice of cases for the quick level."""

import ast
from pathlib import Path
from random import Random

from support.levels import LONGEST, covering

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


def test_a_choice_of_cases_has_everything_and_avoids_what_is_expensive():
    random = Random(0)
    contents = [{(i, random.choice("abc"[: 2 + i % 2])) for i in range(6)} for _ in range(200)]
    contents.append({(0, "a"), "alone"})
    chosen = covering(contents, [1.0] * 201)
    assert set().union(*(contents[n] for n in chosen)) == set().union(*contents)
    assert chosen == sorted(chosen) == covering(contents, [1.0] * 201) and len(chosen) < 8 and 200 in chosen
    assert covering([{1, 2, 3}, {1, 2}, {3}], [10.0, 1.0, 1.0]) == [1, 2]
