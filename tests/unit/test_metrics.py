"""Metrics: the file of lines, TensorBoard, progress, and the arithmetic of load and speed."""

import json
import logging
import re
import time
from types import SimpleNamespace
from unittest.mock import ANY

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapromoe.config.resolve import resolve
from megapromoe.training import metrics
from megapromoe.training.log_files import LogFolder
from megapromoe.training.metrics import (
    Metrics,
    expert_statistics,
    heat_map,
    memory,
    rewind,
    throughput,
)
from megapromoe.training.tensorboard_events import EventFile

CONFIG = resolve("digits")  # MoE blocks 1 and 3, 4 experts
TIMES = {"wall_time": ANY, "elapsed_seconds": ANY}
LOAD_LE = torch.tensor([[4, 2, 2, 0], [2, 2, 2, 2]])


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_readable_as_soon_as_it_is_logged(tmp_path):
    log = Metrics(tmp_path, CONFIG, total_steps=100, terminal=False)
    log.log(10, {"loss": 0.5, "images_per_second": 1234.5}, {"load": LOAD_LE, "gate": torch.tensor([0.25, 0.5])})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 0.5, "images_per_second": 1234.5, "load": LOAD_LE.tolist(), "gate": [0.25, 0.5]} | TIMES
    ]
    log.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = Metrics(tmp_path, CONFIG, total_steps=100, terminal=False)
    log.log(1, {"loss": float("nan"), "gradient_norm": float("inf")}, {"gate": [float("nan"), 1.0]})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "gate": [None, 1]} | TIMES]


def test_resuming_drops_what_will_be_done_again(tmp_path):
    for first, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        log = Metrics(tmp_path, CONFIG, total_steps=100, first_step=first, terminal=False)
        for step in steps:
            log.log(step, {"loss": first + step})
        log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, 50),
        (40, 60),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_starts_within_one_second_have_their_order(tmp_path):
    """TensorBoard reads files in the order of their names, and drops what a later start does again."""
    folder = LogFolder(tmp_path)
    created: list[str] = []
    for _ in range(20):
        EventFile(folder, 1).close()
        created += {path.name for path in (tmp_path / "tensorboard").iterdir()} - {*created}
    assert len(created) == 20 and created == sorted(created)


def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    rewind(file, 5)
    assert file.read_text() == '{"step": 1, "loss": 1}\n'
    assert "dropped 1 unreadable" in caplog.text


def test_a_file_with_nothing_to_drop_is_left_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    before = file.stat().st_ino
    rewind(file, 1)
    assert file.stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_heat_maps_layers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "DRAWING_SHARE", 1e6)
    monkeypatch.setattr(metrics, "FIRST_HEAT_MAP", 0.0)
    log = Metrics(tmp_path, CONFIG, total_steps=80, terminal=False)
    for step in range(1, 11):
        log.log(step, {"loss": 1.0}, {"load": LOAD_LE, "gate": np.array([0.25, 0.5])})
    log.image(10, "samples", np.zeros((16, 24), np.uint8))
    log.image(10, "routing", np.zeros((16, 24, 3), np.uint8))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in board.Images("load")] == [1, 5, 9]
    assert board.Scalars("gate/block 3")[-1].value == 0.5
    assert [board.Images(name)[0].width for name in ("samples", "routing")] == [24, 24]


def test_drawing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """A heat map takes a second, a step four: the first comes after 5 s, and the next 50 s after that."""
    now = 0.0

    def draw(*arguments) -> np.ndarray:
        nonlocal now
        now += 1.0
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(metrics, "heat_map", draw)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    log = Metrics(tmp_path, CONFIG, total_steps=80, terminal=False)
    for step in range(1, 31):
        now += 4
        log.log(step, {"loss": 1.0}, {"load": LOAD_LE})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in board.Images("load")] == [2, 15, 28]


def test_a_disabled_one_writes_nothing(tmp_path, capsys):
    log = Metrics(tmp_path, CONFIG, total_steps=100, enabled=False, terminal=True)
    log.log(1, {"loss": 1.0}, {"load": LOAD_LE})
    log.image(1, "samples", np.zeros((4, 4)))
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_line_of_log_or_a_bar(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    values = {"denoising_loss": 0.51234, "total_loss": 0.51234, "images_per_second": 4321.0, "dead_experts": 3.0}
    (tmp_path / "plain").mkdir()
    plain = Metrics(tmp_path / "plain", CONFIG, total_steps=2500, terminal=False)
    plain.log(100, values)
    plain.close()
    (line,) = caplog.messages
    assert re.fullmatch(r"step 100/2500  0:00:0\d \(0:\d\d:\d\d left\)  denoising loss .*", line)
    assert line.endswith("denoising loss 0.5123  img/s 4,321  dead experts 3 of 8")
    caplog.clear()
    (tmp_path / "bar").mkdir()
    bar = Metrics(tmp_path / "bar", CONFIG, total_steps=2500, first_step=50, terminal=True)
    bar.log(100, values)
    bar.close()
    bar.close()
    shown = capsys.readouterr().err
    assert "100/2500" in shown and "denoising loss=0.5123" in shown and "img/s=4,321" in shown
    assert not caplog.messages


def test_heat_map_leaves_pyplot_alone():
    figures, backend = pyplot.get_fignums(), matplotlib.rcParams["backend"]
    picture = heat_map(np.array([[0, 0, 0], [9, 0, 0]]), "load", (1, 3))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2
    assert (pyplot.get_fignums(), matplotlib.rcParams["backend"]) == (figures, backend)


def test_expert_statistics():
    stats = expert_statistics(LOAD_LE)
    assert stats["dead_experts"] == 1
    assert stats["load_max_over_mean"] == 2
    # Layer 0: shares 1/2, 1/4, 1/4 have 1.5 of 2 bits; layer 1 is even.
    assert stats["load_entropy"] == pytest.approx((0.75 + 1) / 2)
    even, single_expert = torch.ones(2, 4), torch.tensor([[5.0, 0, 0, 0]])
    assert expert_statistics(even) == {"dead_experts": 0, "load_max_over_mean": 1, "load_entropy": 1}
    assert expert_statistics(single_expert) == {"dead_experts": 3, "load_max_over_mean": 4, "load_entropy": 0}


def test_expert_statistics_of_nothing():
    assert expert_statistics(torch.zeros(0, 0)) == {}
    assert expert_statistics(torch.zeros(2, 4)) == {"dead_experts": 8}
    assert expert_statistics(torch.tensor([[0, 0], [3, 3]]))["load_max_over_mean"] == 1
    assert expert_statistics(torch.tensor([[3]])) == {
        "dead_experts": 0,
        "load_max_over_mean": 1,
        "load_entropy": 1,
    }


def test_throughput():
    assert throughput(100, 4.0, 2e9, 2, None) == {"images_per_second": 25, "flops_per_second": 5e10}
    assert throughput(100, 4.0, 2e9, 2, 1e11)["mfu"] == pytest.approx(0.25)


def test_memory_is_in_bytes():
    if torch.cuda.is_available():
        pytest.skip("measures the host")
    held = np.ones(1 << 28, np.uint8)
    assert held.nbytes < memory() < 1 << 42
