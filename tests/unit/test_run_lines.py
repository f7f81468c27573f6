"""The lines of a run read back: names of losses whatever version wrote them, and the time of training."""

import json
import os
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapromoe.config.resolve import resolve
from megapromoe.evaluation.loss_plot import draw_losses, loss_curve
from megapromoe.run_lines import AUXILIARY_LOSSES, current_names, elapsed_seconds, lines_of, metrics_of
from megapromoe.training.metrics import Metrics
from megapromoe.training.run_clock import RunClock, elapsed_before

FORMER = {"step": 10, "loss": 10.5, "denoising": 2.99, "rcl": 7.51, "images_per_second": 128.0, "gate": [0.5]}
NOW = {"step": 20, "denoising_loss": 2.0, "contrastive_loss": 7.0, "total_loss": 9.0, "images_per_second": 64.0}
CONFIG = resolve("digits", overrides=["train.global_batch=128"])


@pytest.fixture
def resumed(tmp_path) -> Path:
    """The metrics of a run that an earlier version began and this one resumed; the last line is torn."""
    file = tmp_path / "metrics.jsonl"
    timed = NOW | {"elapsed_seconds": 12.0}
    later = timed | {"step": 30, "denoising_loss": None, "elapsed_seconds": 40.0}
    lines = [json.dumps(line) for line in (FORMER, timed, later, timed | {"step": 40, "elapsed_seconds": 50.0})]
    file.write_text("\n".join([*lines, "17", '{"step": 50, "lo']))
    return file


def test_a_former_line_is_read_under_the_names_of_today():
    assert current_names(FORMER) == {
        "step": 10,
        "total_loss": 10.5,
        "denoising_loss": 2.99,
        "contrastive_loss": 7.51,
        "images_per_second": 128.0,
        "gate": [0.5],
    }
    assert current_names(NOW) == NOW


def test_a_resumed_run_has_one_curve(resumed, tmp_path):
    lines = metrics_of(resumed)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert [line["denoising_loss"] for line in lines] == [2.99, 2.0, None, 2.0]
    assert all("loss" not in line and "denoising" not in line for line in lines)
    # 10 steps of 128 images at 128 images/s, then as the clock says.
    assert loss_curve(lines, CONFIG) == ([10, 20, 40], [10.0, 12.0, 50.0], [2.99, 2.0, 2.0])
    assert draw_losses(lines, CONFIG, tmp_path / "loss.png") and (tmp_path / "loss.png").stat().st_size > 1000
    assert not draw_losses(lines[:1], CONFIG, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_elapsed_seconds_never_fall():
    lines = [NOW | {"step": step, "elapsed_seconds": s} for step, s in ((1, 5.0), (2, None), (3, 4.0), (4, 9.0))]
    times = elapsed_seconds(lines, 128)
    assert times == [5.0, 7.0, 7.0, 9.0]


def test_the_clock_continues_from_the_checkpoint(resumed, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert elapsed_before({"step": 20, "elapsed_seconds": 31.5}, resumed, 128) == 31.5
    assert elapsed_before({"step": 25}, resumed, 128) == 12.0, "of a checkpoint without it: of the lines up to its step"
    assert elapsed_before({"step": 0}, resumed.with_name("none.jsonl"), 128) == 0.0
    clock = RunClock(31.5, first_step=20, total_steps=60)
    now[0] += 30  # the first ten steps, one of which compiles
    assert clock.elapsed == 61.5 and clock.of_this_start == 30
    assert clock.left(30) == 90.0
    now[0] += 10
    assert clock.left(40) == 20.0, "by the steps since"
    now[0] += 20
    assert clock.left(60) == 0.0


def test_every_auxiliary_loss_of_every_router_and_model_has_a_name():
    source = Path(__file__).parents[2] / "megapromoe" / "nn"
    named = {
        name
        for file in (*(source / "moe").glob("*.py"), source / "dit.py")
        for name in re.findall(
            r'losses\["(\w+)"\]|losses = \{"(\w+)"|losses=\{\*\*self\.losses, "(\w+)"', file.read_text()
        )
    }
    assert {name for pair in named for name in pair if name} == set(AUXILIARY_LOSSES)


def test_tensorboard_has_complete_curves_of_a_resumed_run(tmp_path):
    lines = [FORMER | {"step": step, "denoising": step / 10} for step in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for first in (20, 30):  # the second start of this version does not repeat them
        log = Metrics(tmp_path, CONFIG, total_steps=100, first_step=first, terminal=False)
        log.log(first + 10, {"denoising_loss": 9.0, "total_loss": 9.0})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("denoising_loss")] == [(10, 1), (20, 2), (30, 9), (40, 9)]
    assert [e.value for e in board.Scalars("contrastive_loss")] == pytest.approx([7.51, 7.51])
    assert [e.step for e in board.Scalars("total_loss")] == [10, 20, 30, 40]


def test_what_is_no_file_has_no_lines(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert lines_of(tmp_path / "metrics.jsonl") == lines_of(tmp_path) == lines_of(tmp_path / "none") == []
    assert elapsed_before({"step": 3}, tmp_path / "metrics.jsonl", 8) == 0.0, "and nobody waits for the pipe"
