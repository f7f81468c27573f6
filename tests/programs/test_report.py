"""Figures of a report, from known lines and known digits, and the report of a whole run."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support import processes
from support.sampled_runs import saved_run

from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Digits
from megapromoe.evaluation.report import (
    ReportError,
    classifier_accuracy,
    classifier_own_accuracy,
    training_figures,
    write_report,
)

TOOL = Path(__file__).parents[2] / "tools" / "train_digits.py"


def test_the_classifier_reads_real_digits_and_no_noise():
    real = Digits()
    rng = np.random.default_rng(0)
    assert classifier_accuracy(real.images, real.labels) > 0.99
    assert classifier_accuracy(real.images + rng.normal(0, 0.1, real.images.shape), real.labels) > 0.98
    assert classifier_accuracy(real.images, (real.labels + 1) % 10) < 0.01
    noise = rng.normal(size=(500, 1, 8, 8))
    assert classifier_accuracy(noise, np.arange(500) % 10) < 0.2


def test_the_classifier_is_good_on_digits_it_has_not_seen():
    assert 0.98 < classifier_own_accuracy() < 1.0


def test_figures_of_known_lines():
    config = resolve("digits", overrides=["train.global_batch=100"])
    lines = [
        {"step": 50, "denoising_loss": 9.0, "total_loss": 9.5, "images_per_second": 500.0},  # 10 s
        {"step": 100, "denoising_loss": 4.0, "total_loss": 4.5, "images_per_second": 1000.0},  # 5 s
        {"step": 150, "denoising_loss": None, "total_loss": None, "images_per_second": 1000.0},  # 5 s
        {"step": 200, "denoising_loss": 1.0, "total_loss": 1.5, "images_per_second": 250.0},  # 20 s
    ]
    figures = training_figures(lines, config)
    assert figures["steps"] == 200
    assert figures["final_loss"] == 1.0  # of steps 101..200 that have one
    assert figures["final_losses"] == {"denoising_loss": 1.0, "total_loss": 1.5}
    assert figures["images_per_second"] == 750.0
    assert figures["training_seconds"] == figures["elapsed_seconds"] == pytest.approx(40.0)
    timed = [line | {"elapsed_seconds": 3.0 * line["step"]} for line in lines]
    assert training_figures(timed, config)["elapsed_seconds"] == 600.0
    assert training_figures(lines[:2], config)["final_loss"] == 6.5
    with_router = [line | {"z_loss": 0.25, "expert_loss": None} for line in lines]  # losses of a user's router
    losses = {"denoising_loss": 1.0, "total_loss": 1.5, "z_loss": 0.25}
    assert training_figures(with_router, config)["final_losses"] == losses
    with pytest.raises(ReportError, match="no line"):
        training_figures([], config)


def write_metrics(run):
    """Of an earlier version, whose `loss` is the total, and of this one."""
    former = {"step": 1, "loss": 9.0, "denoising": 1.0, "rcl": 8.0, "images_per_second": 8.0}
    line = {"step": 2, "total_loss": 10.0, "denoising_loss": 2.0, "contrastive_loss": 8.0, "images_per_second": 8.0}
    (run / "metrics.jsonl").write_text(f"{json.dumps(former)}\n{json.dumps(line)}\n{{torn")


@pytest.mark.parametrize("router", ["promoe", "dense"])
def test_the_report_of_a_run(router, tmp_path):
    processes.run(1, saved_run, str(tmp_path), f"model.router={router}")
    with pytest.raises(ReportError, match="metrics.jsonl: is missing"):
        write_report(tmp_path, samples=20)
    write_metrics(tmp_path)
    report = write_report(tmp_path, samples=20, timings={"waiting": 7.4})
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["checkpoint_step"] == 2 and report["final_loss"] == 1.5
    assert report["training_seconds"] == 2.0  # two steps of 8 images
    assert 0 <= report["accuracy"] <= 1 and report["sampling"]["images"] == 20
    page = (tmp_path / "report.md").read_text()
    assert "| time of waiting | 7 s |" in page and "samples.png" in page and "(loss.png)" in page
    means = "denoising loss, contrastive loss, total loss, means of the last 100 steps"
    assert f"| {means} | 1.5000, 8.0000, 9.5000 |" in page
    assert f"**{report['accuracy']:.1%}** of 20" in page
    assert ("routing" in report) == ("routing.png" in page) == (tmp_path / "routing.png").exists()
    assert ("routing" in report) == (router == "promoe")
    assert (tmp_path / "samples.png").exists() and (tmp_path / "loss.png").exists()


def test_latents_have_neither_picture_nor_reader(tmp_path):
    latents = ("model.in_channels=4", "data.source=synthetic", "data.size=30")
    processes.run(1, saved_run, str(tmp_path), *latents)
    write_metrics(tmp_path)
    report = write_report(tmp_path, samples=10)
    assert "accuracy" not in report and "picture" not in report
    assert report["routing"]["images"] == 30
    page = (tmp_path / "report.md").read_text()
    assert "samples.png" not in page and "classifier" not in page and "routing.png" in page


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)  # as Python does for a program
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the import changes it; undone after the test
    spec = importlib.util.spec_from_file_location("train_digits", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("ranks", "side"), [("4", 2), ("2", 2), ("1", 1)])
def test_the_main_job_starts_a_layout_that_its_ranks_allow(tool, monkeypatch, ranks, side):
    started = []

    class Ended:
        returncode = 3

    monkeypatch.setattr(tool.subprocess, "run", lambda command, env: started.append((command, env)) or Ended)
    monkeypatch.setattr("sys.argv", ["train_digits.py", "train.lr=0.5", "--ranks", ranks, "--run-dir", "here"])
    assert tool.main() == 3  # a failed training is the job's own failure
    ((command, env),) = started
    text = " ".join(command)
    assert f"--nproc-per-node {ranks} -m megapromoe train --preset digits --run-dir here" in text
    overrides = command[-3:]
    assert overrides == [f"parallel.tp={side}", f"parallel.ep={side}", "train.lr=0.5"]
    assert env["OMP_NUM_THREADS"] == "1"
    assert resolve("digits", overrides=overrides, world=int(ranks)).parallel.tp == side


@pytest.mark.parametrize(
    ("steps", "accuracy", "code"), [(500, 0.96, 0), (500, 0.94, 1), (100, 0.5, 0), (499, 0.94, 0), (2000, 0.94, 0)]
)
def test_the_required_accuracy_is_for_the_default_length(tool, monkeypatch, tmp_path, capsys, steps, accuracy, code):
    assert resolve("digits").train.steps == 500
    (tmp_path / "report.md").write_text("the page")
    monkeypatch.setattr(tool, "train", lambda *arguments: 0)
    monkeypatch.setattr(
        "megapromoe.evaluation.report.write_report", lambda *arguments: {"accuracy": accuracy, "steps": steps}
    )
    monkeypatch.setattr("sys.argv", ["train_digits.py", "--run-dir", str(tmp_path)])
    assert tool.main() == code
    captured = capsys.readouterr()
    assert ("95% are required only after the default of 500 steps" in captured.out) == (steps != 500)
    assert ("is below 95%" in captured.err) == bool(code)
    if steps != 500:
        assert f"accuracy {accuracy:.1%} after {steps} steps" in captured.out


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["steps=3"], ["--rank", "2"]])
def test_the_main_job_refuses_unknown_options(tool, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["train_digits.py", *arguments])
    with pytest.raises(SystemExit) as error:
        tool.arguments()
    assert error.value.code == 2
