"""The programs of tools/ start the commands of this checkout, without an installation."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megapromoe import cli

ROOT = Path(__file__).parents[2]


TOOLS = {
    "benchmark": "benchmark",
    "convert_checkpoint": "convert",
    "encode_latents": "encode",
    "inspect_checkpoint": "inspect",
    "plot_routing": "routing",
    "scaling_study": "study",
    "superclasses": "superclasses",
    "upcycle": "upcycle",
}


def from_checkout(folder, *words: str) -> subprocess.CompletedProcess:
    """Runs a tool with the installed packages but without the editable installation of this one."""
    site = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", str(ROOT / "tools" / f"{words[0]}.py"), *words[1:]]
    env = {**os.environ, "PYTHONPATH": site}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_its_command_and_needs_no_installation(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([TOOLS[tool], "--help"])
    done = from_checkout(tmp_path, tool, "--help")
    assert done.returncode == 0 and done.stdout == capsys.readouterr().out, done.stderr
    assert from_checkout(tmp_path, tool, "--no-such-option").returncode == 2


def test_every_tool_is_known():
    others = {"checkout", "count_launches", "fuzz", "gpu_run", "measure_plan", "train_digits", "train_scenes"}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == {*TOOLS, *others}


@pytest.mark.full
def test_what_a_tool_starts_imports_the_same_package(tmp_path):
    """A study of an uninstalled checkout, whose trainings are processes of their own."""
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\necho "$PYTHONPATH" > "$(dirname "$0")/path"\n')
    launcher.chmod(0o755)
    plan = ["plan", "study", "--preset", "digits", "--seeds", "0", "--launcher", str(launcher)]
    assert from_checkout(tmp_path, "scaling_study", *plan).returncode == 0
    assert from_checkout(tmp_path, "scaling_study", "run", "study").returncode == 1
    assert (tmp_path / "path").read_text().split(os.pathsep)[0] == str(ROOT)
