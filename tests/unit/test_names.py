"""Names of variables, functions, classes and tests: an AST check refuses the vaguest ones."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each of these was the name of many different things.
REFUSED = {
    *("said", "told", "found", "mine", "aside", "home", "come", "there", "here", "one", "many", "own", "whole"),
    *("seen", "turn", "look", "lean", "around", "stray", "follow"),
    *("says", "tells", "heard", "hears", "asked", "who", "way", "ways", "gone", "thing", "things", "anew"),
}

# In the name of a test: programs do not talk, and a test that fails is read by people who have not written it.
REFUSED_IN_TESTS = {
    *("told", "tell", "tells", "said", "say", "says", "speak", "speaks", "hear", "hears", "heard", "teach", "teaches"),
    *("know", "knows", "nobody", "whoever", "meet", "meets", "travel", "travels", "lie", "lies", "hands", "anew"),
    *("aside", "kin", "stray", "careless", "asked"),
}

# All folders with code.
FOLDERS = ("megapromoe", "tests", "tools", "launchers", "examples")
CLEAN = [folder for folder in FOLDERS if any((ROOT / folder).rglob("*.py"))]

SHAPE = re.compile(r"(?<=[a-z])_[A-Z0-9]*[A-Z][A-Za-z0-9]*$")  # the suffix of `x_BSD`


def names_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each argument, assigned name or attribute, import alias, function and class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


def refused(source: str) -> list[str]:
    """The names of a source file that are in `REFUSED`, without underscores around them and a suffix for the shape."""
    names = ((line, name, SHAPE.sub("", name).strip("_").lower()) for line, name in names_of(source))
    return [f"line {line}: {name}" for line, name, word in sorted(names) if word in REFUSED]


@pytest.mark.parametrize("folder", CLEAN)
def test_no_name_is_refused(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}: has no files"
    problems = {str(file.relative_to(ROOT)): names for file in files if (names := refused(file.read_text()))}
    assert not problems, "name each variable after what it holds"


def test_names_of_tests_are_plain():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [(file.name, name) for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)]
    assert len(names) > 1000
    assert not [f"{file}: {name}" for file, name in names if REFUSED_IN_TESTS & set(name.split("_"))]


PLANTED = {
    "assigned": "said = 1",
    "in a tuple": "a, told = 1, 2",
    "annotated": "found: int = 1",
    "walrus": "if (mine := 1): pass",
    "attribute": "self.home = 1",
    "private attribute": "self._around = 1",
    "constant": "WHOLE = 1",
    "loop": "for one in []: pass",
    "comprehension": "[x for seen in []]",
    "argument": "def f(own): pass",
    "keyword argument": "def f(*, aside=1): pass",
    "lambda": "lambda here: 1",
    "function": "def follow(): pass",
    "method": "class A:\n    async def stray(self): pass",
    "class": "class Turn: pass",
    "with": "with f() as there: pass",
    "exception": "try: pass\nexcept ValueError as come: pass",
    "import": "import numpy as many",
    "pattern": "match x:\n    case [*lean]: pass",
    "with a shape": "mine_ET = 1",
}


@pytest.mark.parametrize("place", PLANTED)
def test_a_planted_name_is_refused(place):
    assert len(refused(f"import os\n{PLANTED[place]}\n")) == 1


def test_words_inside_a_name_and_uses_of_a_name_are_not_refused():
    source = "found_inf = whole_tensor = ONE_RANK = f(said)\nx.told(home=1)\nfrom numpy import look\n"
    assert refused(source) == []


def test_a_planted_name_in_a_file_is_reported(tmp_path, monkeypatch):
    """The whole check, on a tree with one file that has a refused name."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "planted.py").write_text("def f(told):\n    return told\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"planted\.py.*line 1: told"):
        test_no_name_is_refused("tools")
