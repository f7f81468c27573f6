"""docs/troubleshooting.md: every message that it quotes is one that the program or a launcher can print."""

import ast
import re
from pathlib import Path

import pytest

from megapromoe.config.options import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
OTHER_PROGRAMS = "Messages of other programs"
# Between the fixed words of a quoted message: `...`, a capital letter, or a word in capitals that names a value.
PLACEHOLDER = re.compile(r"\.\.\.|\b(?:[A-Z]|HOST:PORT|NODE)\b")


def quoted_messages() -> list[str]:
    """The messages in the first column of every table, except in the section about other programs."""
    messages = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        if not section.startswith(OTHER_PROGRAMS):
            messages += re.findall(r"^\| `([^`]+)` \|", section, re.M)
    return messages


def fixed_words(message: str) -> list[str]:
    """The parts of a quoted message that do not vary."""
    return [part.strip(" ,;()") for part in PLACEHOLDER.split(message) if len(part.strip(" ,;()")) > 2]


def literals(source: str) -> list[str]:
    """The string literals of a Python source but docstrings; formatted ones with `{}` for each value."""
    texts, skipped = [], set()
    for node in ast.walk(ast.parse(source)):  # parents before children
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))  # a docstring
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def program_text() -> str:
    """All strings of the package, the launchers, and a message that is put together from two strings."""
    texts = [text for file in (ROOT / "megapromoe").rglob("*.py") for text in literals(file.read_text("utf-8"))]
    texts += [script.read_text("utf-8") for script in (ROOT / "launchers").glob("*.sh")]
    return "\n".join([*texts, str(ConfigError(["one thing", "another"]))])


def test_every_quoted_message_is_in_the_source(program_text):
    messages = quoted_messages()
    assert len(messages) > 40 and len(set(messages)) == len(messages)
    missing = [
        f"{message!r}: no string holds {part!r}; a message was reworded: quote it as it is now"
        for message in messages
        for part in fixed_words(message)
        if part not in program_text
    ]
    assert missing == []


def test_every_message_has_words_to_search_for():
    assert [message for message in quoted_messages() if max(map(len, fixed_words(message))) < 8] == []


def test_every_row_has_a_cause_and_a_remedy():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [row for row in rows if len([cell for cell in row.strip("|").split(" | ") if cell.strip()]) != 3] == [
        row for row in rows if set(row) <= set("|-")
    ]


def test_an_invented_message_is_missed(program_text):
    assert fixed_words("rank R has lost ... its way") == ["rank", "has lost", "its way"]
    assert "has lost its way" not in program_text
    assert literals('"""Doc."""\nx = f"a {b} c"\n') == ["a {} c"]
