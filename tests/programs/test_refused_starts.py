"""Starts that fail in the same way each time end with code 2, so that no launcher repeats them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = [
    "train",
    "--preset",
    "digits",
    "train.steps=1",
    "train.warmup=0",
    "model.hidden_size=32",
    "train.global_batch=8",
]


def started(folder: Path | str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megapromoe", *START, "--run-dir", str(folder), *words]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "RANK"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env | {"OMP_NUM_THREADS": "1"})


def foreign(folder: Path) -> list[str]:
    (folder / "thesis.tex").touch()
    return []


WRONG = {
    "a data path that does not exist": (
        lambda folder: ["data.source=latents", f"data.path={folder}/nowhere"],
        "nowhere",
    ),
    "a step that has no checkpoint": (lambda folder: ["--step", "5"], "has no complete checkpoint of step 5"),
    "a folder with other files": (foreign, "is not empty (holds thesis.tex)"),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", WRONG)
def test_a_start_that_can_never_succeed_ends_with_2(fault, tmp_path, fault_table):
    make, message = WRONG[fault]
    done = started(tmp_path, *make(tmp_path))
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    fault_table.append((fault, "named, exit code 2: launchers do not queue the job again", "nothing"))


@pytest.mark.full
def test_a_folder_that_cannot_be_made_or_is_another_run_s_ends_with_2(tmp_path, fault_table):
    assert started("/proc/run").returncode == 2
    (tmp_path / "config.yaml").write_text("model: {hidden_size: 64}\n")
    done = started(tmp_path)
    assert (done.returncode, "belongs to a run with another config" in done.stderr) == (2, True), done.stderr
    fault_table.append(("the folder of another run", "the differing fields are listed, exit code 2", "nothing"))
