"""Runs whose disk is really full for a while, or whose folder is renamed while they train: they go on."""

import json
import os
from pathlib import Path

from support.full_disks import fill, free, small_disk
from support.processes import run
from support.training_runs import losses, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of, steps_in

SETTINGS = ("train.steps=8", "train.save_every=1", "train.sample_every=1", "train.keep_last=2", "sample.steps=1",
            "model.in_channels=3", "train.max_failed_saves=9")  # fmt: skip


def disturbed(folder: str, disturb_at: int, restore_at: int, fault: str) -> list[str]:
    """Trains; something happens to the run's disk before one step, and is over before another. Returns warnings."""
    import logging

    from megapromoe.engine.engine import Engine

    place, real, steps, records = Path(folder), Engine.step, [], []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megapromoe").addHandler(handler)

    def step(self, *arguments):
        steps.append(1)
        if len(steps) in (disturb_at, restore_at):
            begins = len(steps) == disturb_at
            if fault == "full":
                (fill if begins else free)(place.parent)
            elif begins:
                os.rename(place, place.with_name("moved"))
            else:
                os.rename(place.with_name("moved"), place)
        return real(self, *arguments)

    Engine.step = step
    train(folder, *SETTINGS)
    return records


def check(folder: Path, warnings: list[str]) -> list[str]:
    """All steps are in all logs, the last checkpoint is whole; returns what the saves said."""
    assert len(losses(folder)) == 8 and None not in losses(folder)
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert (
        [e.step for e in board.Scalars("denoising_loss")]
        == [e.step for e in board.Images("samples")]
        == list(range(1, 9))
    )
    assert len(list((folder / "samples").iterdir())) == 8
    assert 8 in steps_in(folder / "checkpoints")
    Checkpoint(folder_of(folder / "checkpoints", 8)).verify()
    for log in ("metrics.jsonl", "tensorboard", "samples"):
        assert sum("can be written again" in w and log in w for w in warnings) <= 1
    assert 1 <= sum("training continues" in w for w in warnings) <= 3
    return [w for w in warnings if "a checkpoint was not saved" in w]


def test_a_full_disk_costs_saves_and_no_log(tmp_path, fault_table):
    with small_disk(tmp_path / "disk", "24m") as disk:
        (messages,) = run(1, disturbed, str(disk / "run"), 3, 6, "full")
        failed = check(disk / "run", messages)
        assert len(failed) == 3 and all("no room" in w or "No space left" in w for w in failed)
        steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 9))
    what = "named once; metrics, TensorBoard and samples wait in memory, and are written when there is room"
    fault_table.append(("the disk is full for some steps", what, "the saves of these steps"))


def test_a_renamed_folder_costs_saves_and_no_log(tmp_path, fault_table):
    (messages,) = run(1, disturbed, str(tmp_path / "run"), 3, 6, "renamed")
    failed = check(tmp_path / "run", messages)
    assert 3 <= len(failed) <= 4, "and perhaps the save that was being written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    what = "named once; logs wait in memory, and are written when the folder is back"
    fault_table.append(("a run folder that is renamed for some steps", what, "the saves of these steps"))
