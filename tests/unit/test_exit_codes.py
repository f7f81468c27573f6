"""Exit codes: one table in the documents, and one rule for errors that some ranks or all of them have."""

import ast
import re
from pathlib import Path

import pytest

from megapromoe import cli
from megapromoe.data.datasets import DatasetError
from megapromoe.distributed import agreement
from megapromoe.distributed.agreement import raising_together
from megapromoe.errors import ExitCode, UserError, repeating_cannot_help

ROOT = Path(__file__).parents[2]


def table() -> dict[int, str]:
    """The rows of the exit codes in docs/cluster.md."""
    text = (
        (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    )
    return {int(code): row for code, row in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.M)}


def classes_with_codes() -> dict[str, str]:
    """Class -> name of the code, of all classes that set one."""
    codes = {}
    for file in (ROOT / "megapromoe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "exit_code":
                        codes[node.name] = ast.unparse(line.value).removeprefix("ExitCode.")
    return codes


def test_the_documents_name_every_code_and_every_class_that_sets_one():
    rows = table()
    assert sorted(rows) == sorted(ExitCode)
    for name, code in classes_with_codes().items():
        assert f"`{name}`" in rows[ExitCode[code]], f"{name} is missing in the row of {code}"
    for code in ExitCode:
        assert re.search(rf"\b{code.value} ", cli._EXAMPLES)


def test_the_launchers_use_the_same_exit_codes():
    text = (ROOT / "launchers" / "slurm.sh").read_text()
    for code in (ExitCode.MISCONFIGURED, ExitCode.BAD_NODES, ExitCode.STOPPED, ExitCode.HUNG):
        assert re.search(rf"\b{code.value}\b", text.partition("Exit codes:")[2].partition("'")[0])


class Wrong(UserError):
    exit_code = ExitCode.MISCONFIGURED


class Failed(UserError):
    pass


def code_of(monkeypatch, others: list, raised: Exception, **options) -> int:
    """The code with which this rank ends, where the other ranks report `others`."""
    monkeypatch.setattr(agreement, "all_gather_values", lambda own_value: [own_value, *others])
    with pytest.raises(Failed) as ended, raising_together(Failed, **options):
        raise raised
    return ended.value.exit_code


def test_an_error_of_rank_0_alone_keeps_its_code(monkeypatch):
    """Such as that of the run directory, which only rank 0 opens."""
    assert code_of(monkeypatch, [(None, None)], Wrong("w")) == 2
    assert code_of(monkeypatch, [(None, None)], Failed("f")) == 1
    assert code_of(monkeypatch, [(None, None)], OSError("f")) == 1


def test_an_error_of_every_rank_is_a_wrong_setup_and_one_of_some_is_not(monkeypatch):
    """Every rank opens the data: where some cannot, other nodes may do better."""
    options = {"catch": (DatasetError,), "name_ranks": True, "exit_code": ExitCode.MISCONFIGURED}
    assert code_of(monkeypatch, [("no data", 2)], DatasetError("no data"), **options) == 2
    assert code_of(monkeypatch, [(None, 2)], DatasetError("no data"), **options) == 1
    assert code_of(monkeypatch, [], DatasetError("no data"), **options) == 2  # alone


def test_errors_of_different_codes_are_tried_again(monkeypatch):
    assert code_of(monkeypatch, [("other", 1)], Wrong("w")) == 1
    assert code_of(monkeypatch, [("other", 2)], Wrong("w")) == 2


def test_only_the_named_errors_get_the_exit_code_of_a_misconfiguration():
    for error, code in ((Failed("f"), 2), (UserError("u"), 1)):
        with pytest.raises(UserError) as ended, repeating_cannot_help(Failed):
            raise error
        assert ended.value.exit_code == code
