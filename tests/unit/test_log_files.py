"""Logs that cannot be written: one warning, no error, and nothing lost once they can be again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.full_disks import fill, free, largest_file, small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapromoe.config.resolve import resolve
from megapromoe.training import log_files
from megapromoe.training.log_files import AppendedFile, LogFolder
from megapromoe.training.metrics import Metrics

CONFIG = resolve("digits")
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run directory."""
    made = tmp_path / "run"
    made.mkdir()
    (made / "environment.json").write_text('[{"pid": 1}]')
    return made


def log(metrics: Metrics, *steps: int) -> None:
    for step in steps:
        metrics.log(step, {"loss": step / 2} | {f"a metric with a long name {n}": n for n in range(100)})  # over a page
        metrics.samples(step, PICTURE)


def check(folder: Path, steps: list[int]) -> None:
    """All three logs have these steps, and nothing in part."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(step, step / 2) for step in steps]
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(step, step / 2) for step in steps]
    assert [e.step for e in board.Images("samples")] == steps
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{step:08d}.png" for step in steps]


def warnings(caplog) -> list[str]:
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    caplog.clear()
    return messages


def test_a_full_disk_loses_no_log(tmp_path, caplog):
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = disk / "run"
        folder.mkdir()
        metrics = Metrics(folder, CONFIG, 100, terminal=False)
        log(metrics, 1, 2)
        fill(disk)
        log(metrics, 3, 4, 5)
        failed = warnings(caplog)
        assert len(failed) == 3, "one for each log"
        assert all("No space left on device" in m and "training continues" in m for m in failed)
        free(disk)
        log(metrics, 6)
        again = [m.rpartition(": ")[2] for m in warnings(caplog)]
        assert sorted(again) == [f"can be written again; wrote the {n} entries that were pending" for n in (4, 4, 7)]
        log(metrics, 7)
        metrics.close()
        assert not warnings(caplog)
        check(folder, [1, 2, 3, 4, 5, 6, 7])


def test_a_disk_that_is_full_from_the_start(tmp_path, caplog):
    with small_disk(tmp_path / "disk", "2m") as disk:
        (disk / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 9}\n')
        fill(disk)
        metrics = Metrics(disk, CONFIG, 100, first_step=1, terminal=False)
        log(metrics, 2, 3)
        free(disk)
        log(metrics, 4)
        metrics.close()
        lines = [json.loads(line)["loss"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert lines == [0.5, 1.0, 1.5, 2.0], "what was logged of later steps is dropped before the first new line"


def test_a_write_that_ends_half_way_leaves_no_part_of_a_line(folder):
    """Without a file system of its own: a limit on the size of files, met in the middle of a line."""
    path = folder / "metrics.jsonl"
    file = AppendedFile(path, LogFolder(folder))
    record = b"0123456789abcde\n"
    file.write(record)
    with largest_file(40):
        for _ in range(3):
            file.write(record)
            assert path.read_bytes() == record * 2 or path.read_bytes() == record
    file.write(record)
    file.close()
    assert path.read_bytes() == record * 5


def test_the_rest_of_a_failed_write_is_removed_later(folder, monkeypatch):
    """Where the file cannot even be made shorter."""
    path = folder / "log"
    file = AppendedFile(path, LogFolder(folder))
    file.write(b"first\n")

    def refuse(*_):
        raise OSError(5, "Input/output error")

    with largest_file(9), monkeypatch.context() as patched:
        patched.setattr(log_files.os, "ftruncate", refuse)
        file.write(b"second\n")
    assert path.read_bytes() == b"first\nsec"
    file.write(b"third\n")
    assert path.read_bytes() == b"first\nsecond\nthird\n"


@pytest.mark.parametrize("back", [True, False])
def test_a_renamed_run_folder_is_waited_for(folder, caplog, back):
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    log(metrics, 1)
    moved = folder.rename(folder.with_name("moved"))
    log(metrics, 2, 3)
    assert len(warnings(caplog)) == 3 and not folder.exists()
    if back:
        moved.rename(folder)
        log(metrics, 4)
        metrics.close()
        check(folder, [1, 2, 3, 4])
    else:
        metrics.close()
        lost = [m for m in warnings(caplog) if "never written" in m]
        assert len(lost) == 3
        check(moved, [1])


def test_a_copy_of_the_run_folder_is_that_run(folder):
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    log(metrics, 1)
    old = folder.rename(folder.with_name("old"))
    log(metrics, 2)
    shutil.copytree(old, folder)
    log(metrics, 3)
    metrics.close()
    check(folder, [1, 2, 3])


@pytest.mark.parametrize("starts", ['[{"pid": 2}]', None])
def test_another_run_at_the_same_path_gets_none_of_the_logs(folder, caplog, starts):
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    log(metrics, 1)
    shutil.rmtree(folder)
    folder.mkdir()
    if starts:
        (folder / "environment.json").write_text(starts)
    before = sorted(folder.rglob("*"))
    log(metrics, 2)
    metrics.close()
    assert sorted(folder.rglob("*")) == before
    assert "this path now leads to the folder of another run" in caplog.text


def test_removed_files_and_folders_begin_again(folder, caplog):
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    log(metrics, 1)
    for name in ("tensorboard", "samples"):
        shutil.rmtree(folder / name)
    (folder / "metrics.jsonl").unlink()
    log(metrics, 2)
    metrics.close()
    assert not warnings(caplog)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and [p.name for p in (folder / "samples").iterdir()] == ["step-00000002.png"]


def test_pending_log_entries_are_bounded(folder, caplog, monkeypatch):
    monkeypatch.setattr(log_files, "MAX_PENDING", 25)
    file = AppendedFile(folder / "log", LogFolder(folder))
    moved = folder.rename(folder.with_name("moved"))
    for number in range(4):
        file.write(f"entry {number}..\n".encode())
    moved.rename(folder)
    file.write(b"entry 4..\n")
    assert (folder / "log").read_text() == "entry 0..\nentry 1..\nentry 4..\n"
    assert "but 2 entries were dropped" in caplog.text


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_in_the_place_of_the_metrics_is_replaced(folder, kind, caplog):
    target = folder.parent / "precious"
    target.write_text('{"step": 1, "loss": 0.5}\n')
    path = folder / "metrics.jsonl"
    (path.symlink_to if kind == "symbolic" else path.hardlink_to)(target)
    metrics = Metrics(folder, CONFIG, 100, first_step=1, terminal=False)
    metrics.log(2, {"loss": 1.0})
    metrics.close()
    assert target.read_text() == '{"step": 1, "loss": 0.5}\n'
    assert not path.is_symlink() and len(path.read_text().splitlines()) == 2
    assert "was a link" in caplog.text


def test_a_link_that_is_put_there_later_is_not_followed(folder, caplog):
    target = folder.parent / "precious"
    target.write_text("do not touch")
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    metrics.log(1, {"loss": 1.0})
    path = folder / "metrics.jsonl"
    path.unlink()
    path.symlink_to(target)
    metrics.log(2, {"loss": 1.0})
    assert target.read_text() == "do not touch" and "is a symbolic link to" in caplog.text
    path.unlink()
    metrics.log(3, {"loss": 1.0})
    metrics.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_pipe_in_the_place_of_the_metrics_is_not_waited_for(folder, caplog):
    os.mkfifo(folder / "metrics.jsonl")
    metrics = Metrics(folder, CONFIG, 100, terminal=False)
    metrics.log(1, {"loss": 1.0})
    metrics.close()
    assert "is no regular file" in caplog.text
