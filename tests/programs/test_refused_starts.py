"""Starts that fail in the same way each time end with code 2, so that no launcher repeats them."""

import os
from pathlib import Path

import pytest
from support.forked_ranks import run_to_end

START = [
    "train",
    "--preset",
    "digits",
    "train.steps=1",
    "train.warmup=0",
    "model.hidden_size=32",
    "train.global_batch=8",
]


def started(run_dir: Path | str, output: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of a start."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "RANK"))}
    return run_to_end([*START, "--run-dir", str(run_dir), *words], env | {"OMP_NUM_THREADS": "1"}, output)


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
    (tmp_path / "run").mkdir()
    code, text = started(tmp_path / "run", tmp_path / "output", *make(tmp_path / "run"))
    assert (code, message in text) == (2, True), text
    assert "Traceback" not in text
    fault_table.append((fault, "named, exit code 2: launchers do not queue the job again", "nothing"))


@pytest.mark.full
def test_a_folder_that_cannot_be_made_or_is_another_run_s_ends_with_2(tmp_path, fault_table):
    assert started("/proc/run", tmp_path / "output")[0] == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {hidden_size: 64}\n")
    code, text = started(tmp_path / "run", tmp_path / "output")
    assert (code, "belongs to a run with another config" in text) == (2, True), text
    fault_table.append(("the folder of another run", "the differing fields are listed, exit code 2", "nothing"))
