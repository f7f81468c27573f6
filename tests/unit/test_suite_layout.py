"""The layout of the tests."""

import ast
from pathlib import Path

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
