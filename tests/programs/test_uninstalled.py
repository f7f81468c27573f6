"""The program from a checkout that is not installed: a copy of the package on PYTHONPATH, without metadata."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.training_runs import losses

from megapromoe import __version__
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.versions import versions

ROOT = Path(__file__).parents[2]
# Imported by Python at its start: this environment's metadata of the package, if it has any, is not found.
HIDDEN = """
from importlib import metadata
real = metadata.distribution
def distribution(name):
    if name == "megapromoe":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
"""


@pytest.mark.full
def test_a_run_trains_saves_and_continues(tmp_path):
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    for folder in ("megapromoe", "ds_configs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "sitecustomize.py").write_text(HIDDEN)
    settings = ["model.hidden_size=32", "train.warmup=0", "train.log_every=1", "train.global_batch=32"]
    for steps in (2, 3):
        command = [sys.executable, "-m", "megapromoe", "train", "--run-dir", str(run), "--preset", "digits"]
        done = subprocess.run(
            [*command, *settings, f"train.steps={steps}"],
            env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert Checkpoint(folder_of(run / "checkpoints", steps)).manifest["versions"]["megapromoe"] == __version__
        log = done.stderr.splitlines()
        assert f"run        {run}: {'begins at step 0' if steps == 2 else 'resumes from step 2'}" in log
        assert sum(line.startswith(f"step {steps}/{steps}  ") and "denoising loss" in line for line in log) == 1
        assert log[-1].startswith("next: megapromoe sample --run-dir ") and f"checkpoint: {run}" in log[-2]
    assert len(losses(run)) == 3
    times = [json.loads(line)["elapsed_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] > 0, "the second start goes on with the clock of the first"
    assert json.loads((run / "environment.json").read_text())[0]["versions"]["megapromoe"] == __version__


def test_a_package_without_metadata_has_no_version():
    assert versions(("torch", "no-such-package")) == {
        "torch": versions(("torch",))["torch"],
        "no-such-package": "not installed",
    }
