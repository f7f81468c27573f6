"""tools/train_scenes.py: the commands that it starts, what it requires, and a small job from scenes to scores."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.documented_commands import documented
from support.forked_job import ForkedJob
from support.text_folders import write_text_encoders

from megapromoe.config.resolve import resolve
from megapromoe.evaluation.scene_tasks import TASKS

TOOL = Path(__file__).parents[2] / "tools" / "train_scenes.py"
STEPS = resolve("scenes").train.steps


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)  # as Python does for a program
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the import changes it; undone after the test
    spec = importlib.util.spec_from_file_location("train_scenes", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["train_scenes.py", *words])


@pytest.mark.parametrize(("ranks", "side"), [(4, 2), (2, 2), (1, 1)])
def test_the_job_starts_a_layout_that_its_ranks_allow(tool, monkeypatch, ranks, side):
    arguments(monkeypatch, "train.lr=0.5", "--ranks", str(ranks), "--run-dir", "here", "--data", "there")
    options = tool.arguments()
    words = tool.training(options)
    settings = ["data.source=latents", "data.path=there", f"parallel.tp={side}", f"parallel.ep={side}", "train.lr=0.5"]
    assert words == ["train", "--preset", "scenes", "--run-dir", "here", *settings]
    assert resolve("scenes", overrides=settings, world=ranks).parallel.ep == side
    started = []

    class Ended:
        returncode, stdout = 3, None

    monkeypatch.setattr(tool.subprocess, "run", lambda command, **how: started.append((command, how)) or Ended)
    assert tool.main() == 3, "a failed part is the job's own failure"
    ((command, how),) = started
    assert f"--nproc-per-node {ranks} -m megapromoe encode --scenes 20000 --text-encoder minilm" in " ".join(command)
    assert how["env"]["OMP_NUM_THREADS"] == "1"


def test_scenes_that_are_encoded_are_kept(tool, monkeypatch, tmp_path):
    arguments(monkeypatch, "--data", str(tmp_path), "--scenes", "10")
    assert "--shard-size 3 " in " ".join(tool.encoding(tool.arguments()))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.json").write_text("{}")
    assert tool.encoding(tool.arguments()) == []


@pytest.mark.parametrize(("require", "right", "code"), [("0.7", 42, 0), ("0.7", 41, 1), ("", 0, 0)])
def test_a_share_can_be_required(tool, monkeypatch, tmp_path, capsys, require, right, code):
    """70 % of 99.5 % of 60 pictures are 41.8."""
    record = {"step": STEPS, "right": {TASKS[0]: [right, 60]}, "ceiling": {TASKS[0]: [398, 400]}}
    (tmp_path / "report.md").write_text("the page")
    monkeypatch.setattr(tool, "launch", lambda ranks, words: (0, f"a line\n{json.dumps(record)}\n"))
    monkeypatch.setattr("megapromoe.evaluation.scene_report.write_scene_report", lambda *arguments: {})
    required = ["--require", require] if require else []
    arguments(monkeypatch, "--run-dir", str(tmp_path), "--data", str(tmp_path), *required)
    assert tool.main() == code
    assert ("68.7% of the ceiling, less than --require 0.7" in capsys.readouterr().err) == bool(code)


def test_the_documented_longer_run_is_a_layout_that_can_run():
    (command,) = [c.text for c in documented() if "--run-dir runs/scenes_long" in c.text and " train " in c.text]
    overrides = [word for word in command.split() if re.match(r"\w+\.\w+=", word)]
    config = resolve("scenes", overrides=overrides, world=2)
    assert "--nproc-per-node 2 " in command and config.train.global_batch % 2 == 0
    assert config.train.steps > 10 * STEPS and config.train.steps % config.train.snapshot_every == 0


@pytest.mark.parametrize(
    "words", [["--ranks", "0"], ["--scenes", "0"], ["--require", "70"], ["steps=3"], ["--rank", "2"]]
)
def test_unknown_options_are_refused(tool, monkeypatch, words):
    arguments(monkeypatch, *words)
    with pytest.raises(SystemExit) as error:
        tool.arguments()
    assert error.value.code == 2


@pytest.mark.full
def test_a_small_job_runs_from_scenes_to_scores_and_can_be_repeated(tool, monkeypatch, capsys, tmp_path):
    encoder = write_text_encoders(tmp_path / "encoders") / "qwen2"
    words = ["--ranks", "2", "--scenes", "64", "--text-encoder", str(encoder), "--num-images", "12"]
    words += ["--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "data")]
    words += ["train.steps=2", "train.save_every=0", "train.log_every=1", "train.global_batch=16", "sample.steps=2"]
    words += ["model.depth=2", "model.hidden_size=16", "model.heads=2", "model.text_width=16"]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert "| overall | | | " in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["layout"]["tp"] == report["layout"]["ep"] == 2 and report["scores"]["count"] == 12
    assert (tmp_path / "run" / "samples.png").is_file() and (tmp_path / "run" / "loss.png").is_file()

    started = []

    def launch(ranks: int, command: list[str]) -> tuple[int, str]:
        """Ranks that are forked, which takes less time."""
        started.append(command[0])
        job = ForkedJob(ranks, command, tmp_path)
        try:
            output, _ = job.communicate(timeout=240)
        finally:
            job.kill()
        return job.returncode, output

    monkeypatch.setattr(tool, "launch", launch)
    arguments(monkeypatch, *words)
    assert tool.main() == 0
    assert "| overall | | | " in capsys.readouterr().out
    assert started == ["train", "evaluate"], "the data is encoded already"
    again = json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    assert again | {"time": ""} == report["scores"] | {"time": ""}
