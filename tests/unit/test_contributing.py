"""CONTRIBUTING.md and the habits that it describes: what they name exists, and the same checks run everywhere."""

import re
from pathlib import Path

import yaml

from megapromoe.commands import convert
from megapromoe.conversion import formats

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_path_exists():
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|[\w]+\.(?:md|toml))`", GUIDE)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "megapromoe" / path).exists()] == []


def test_every_name_exists():
    """Names in the steps of a recipe are of some file that the same step names."""
    for step in re.findall(r"^\d\. (.*?)(?=^\d\. |^## |\Z)", GUIDE, flags=re.M | re.S):
        files = [ROOT / path for path in re.findall(r"`([\w/]+\.(?:py|sh))`", step) if (ROOT / path).exists()]
        text = "\n".join(file.read_text() for file in files)
        names = re.findall(r"`(_?[A-Za-z]\w*)(?:\(.*?\))?`", step)
        assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_hooks_are_the_checks_of_make():
    recipe = re.search(r"^check: env docs\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    *code, docs = local["hooks"]
    assert [hook["entry"] for hook in code] == checks
    assert all(re.search(hook["files"], name) for hook in code for name in ("a/b.py", "pyproject.toml"))
    assert docs["entry"] == "make docs"
    assert all(re.search(docs["files"], name) for name in ("docs/train.md", "mkdocs.yml"))


def test_the_workflow_only_calls_the_test_command():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step.get("run") for step in job["steps"]] == [None, ".ci/run"]
    assert job["steps"][0]["uses"].startswith("actions/checkout@")


def test_the_command_line_has_the_formats_of_the_library():
    assert convert.FORMATS == formats.FORMATS
