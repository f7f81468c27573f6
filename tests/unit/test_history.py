"""Branches: a start that goes back moves what is newer, loses nothing whenever it is killed, and is asked for once."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megapromoe.checkpoint import history
from megapromoe.checkpoint.history import complete_moves, first_step, leave_branch, left_branches, plan_start, progress
from megapromoe.checkpoint.manifest import CheckpointError, seal
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of, steps_in


def saved(run: RunDirectory, step: int, branch: str | None = None) -> None:
    """A step folder whose manifest alone is sound."""
    folder = folder_of(run.checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(seal({"step": step, "updates": step, "run": "ours", "branch": branch}))


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps, saved every five."""
    run = RunDirectory(tmp_path / "run")
    for step in range(5, 41, 5):
        saved(run, step)
    for folder in (run.samples, run.tensorboard):
        folder.mkdir()
    for step in (10, 20, 30, 40):
        (run.samples / f"step-{step:08d}.png").write_bytes(b"picture")
    (run.tensorboard / "events").write_bytes(b"events")
    run.metrics.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 41)))
    return run


def test_a_step_is_requested_once(run):
    start = plan_start(run, 20)
    assert (start.step, start.branch, start.note) == (20, "step-20", "")
    left = leave_branch(run, 20, "a reason")
    assert left.steps == (25, 30, 35, 40) and steps_in(run.checkpoints) == [5, 10, 15, 20]
    assert plan_start(run, 20) == start, "the branch has no checkpoint yet"
    saved(run, 28, "step-20")
    again = plan_start(run, 20)
    assert again.step is None and again.branch == "step-20" and "--fork NAME begins another" in again.note
    shutil.rmtree(folder_of(run.checkpoints, 20))
    assert plan_start(run, 20) == again, "also when the step itself was removed meanwhile"
    assert plan_start(run, 15).step == 15, "another step is another branch"


def test_a_fork_is_begun_once_too(run):
    assert plan_start(run, 20, "lower").step == 20
    leave_branch(run, 20, "a reason")
    saved(run, 25, "lower")
    assert plan_start(run, 20, "lower").step is None
    other = plan_start(run, 20, "lowest")
    assert (other.step, other.branch) == (20, "lowest")
    leave_branch(run, 20, "a reason")
    with pytest.raises(CheckpointError, match="--fork lower: the run has, or had, a branch of that name"):
        plan_start(run, 20, "lower")
    with pytest.raises(CheckpointError, match="--fork main: the run has"):
        plan_start(run, 20, "main")
    with pytest.raises(CheckpointError, match=r"--fork '\.\./x': a name has letters"):
        plan_start(run, 20, "../x")
    with pytest.raises(CheckpointError, match="give that step with --step N"):
        plan_start(run, None, "lower")


def test_a_step_that_is_in_a_branch_folder_is_found(run):
    leave_branch(run, 20, "a reason")
    with pytest.raises(CheckpointError, match=r"of step 35; there are 5, 10, 15, 20; .*branches/main-after-20 has it"):
        plan_start(run, 35)


def test_what_is_newer_is_moved_and_listed(run):
    before = run.metrics.read_text().splitlines()
    left = leave_branch(run, 20, "why")
    assert left.folder == run.branches / "main-after-20"
    assert steps_in(left.folder / "checkpoints") == [25, 30, 35, 40]
    assert (left.folder / "metrics.jsonl").read_text().splitlines() == before[20:]
    assert sorted(os.listdir(left.folder / "samples")) == ["step-00000030.png", "step-00000040.png"]
    assert (left.folder / "tensorboard" / "events").read_bytes() == b"events"
    assert sorted(os.listdir(run.samples)) == ["step-00000010.png", "step-00000020.png"]
    assert left_branches(run) == [left]
    assert leave_branch(run, 20, "nothing is newer") is None
    saved(run, 25, "step-20")
    second = leave_branch(run, 20, "why again")
    assert second.folder.name == "step-20-after-20" and left_branches(run) == [left, second]
    saved(run, 25, "step-20")
    assert leave_branch(run, 20, "thrice").folder.name == "step-20-after-20-2"


def test_what_is_moved_back_stays(run):
    left = leave_branch(run, 20, "why")
    os.rename(folder_of(left.folder / "checkpoints", 25), folder_of(run.checkpoints, 25))
    complete_moves(run)
    assert steps_in(run.checkpoints) == [5, 10, 15, 20, 25]


def test_pictures_of_sample_go_with_their_step(run):
    for name in ("step-00000010-0a1b2c.png", "step-00000030-0a1b2c.png", "step-later.png"):
        (run.samples / name).write_bytes(b"picture")
    left = leave_branch(run, 20, "why")
    assert (left.folder / "samples" / "step-00000030-0a1b2c.png").exists()
    stay = {"step-00000010.png", "step-00000010-0a1b2c.png", "step-00000020.png", "step-later.png"}
    assert set(os.listdir(run.samples)) == stay


def contents(run: RunDirectory) -> dict[str, int]:
    """How often each step's checkpoint, picture and log line are in the run and its complete branches."""
    count: dict[str, int] = {}
    folders = [run.folder, *(branch.folder for branch in left_branches(run))]
    for folder in folders:
        for path in [*folder.glob("checkpoints/step-*"), *folder.glob("samples/*.png")]:
            count[path.name] = count.get(path.name, 0) + 1
    return count


def test_a_branch_folder_that_is_damaged_or_of_another_kind_is_never_removed(run, caplog):
    left = leave_branch(run, 20, "why")
    (left.folder / "branch.json").write_text("{")
    kept = leave_branch(run, 10, "why")
    (kept.folder / "branch.json").unlink()
    notes = run.branches / "notes"
    notes.mkdir()
    complete_moves(run)
    assert steps_in(left.folder / "checkpoints") == [25, 30, 35, 40] and steps_in(kept.folder / "checkpoints") == [
        15,
        20,
    ]
    assert notes.is_dir() and left_branches(run) == [] and "main-after-20/branch.json: is damaged" in caplog.text


@pytest.mark.parametrize("killed_at", range(16))
def test_a_kill_at_any_instant_loses_nothing_and_is_completed(run, killed_at, monkeypatch):
    expected = {name: 1 for name in contents(run)}
    calls = []

    def killing(real):
        def function(*arguments, **named):
            calls.append(real)
            if len(calls) == killed_at + 1:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return function

    with monkeypatch.context() as patch:
        for module, name in (
            *((history, name) for name in ("write_text", "write_json")),
            *((history.os, name) for name in ("rename", "replace", "mkdir")),
            (history.shutil, "copytree"),
        ):
            patch.setattr(module, name, killing(getattr(module, name)))
        try:
            leave_branch(run, 20, "why")
        except KeyboardInterrupt:
            pass
        else:
            assert killed_at >= 13, "each call but the last ones is one to be killed at"
    held = steps_in(run.checkpoints)
    assert held == list(range(5, 5 * len(held) + 1, 5)), "one history without a gap"
    assert contents(run) == expected
    complete_moves(run)
    leave_branch(run, 20, "the same command again")
    assert contents(run) == expected and steps_in(run.checkpoints) == [5, 10, 15, 20]
    (left,) = left_branches(run)
    assert len((left.folder / "metrics.jsonl").read_text().splitlines()) == 20
    assert not list(Path(run.branches).glob("*/*.writing"))


def test_a_dry_run_shows_where_a_start_would_begin(run):
    assert progress(run) == "continues from step-00000040, branch 'main'"
    moved = f"its checkpoints of steps 25, 30, 35, 40 would move to {run.branches}"
    assert progress(run, 20) == f"begins branch 'step-20' at step-00000020; {moved}"
    leave_branch(run, 20, "why")
    saved(run, 28, "step-20")
    assert progress(run, 20).startswith("continues from step-00000028, branch 'step-20' (--step 20: branch 'step-20'")
    assert progress(RunDirectory(run.folder / "none")) == "has no checkpoint yet, starts from step 0"


def test_the_step_where_a_start_would_begin(run):
    assert first_step(run) == 40 and first_step(run, 20) == 20
    leave_branch(run, 20, "why")
    saved(run, 28, "step-20")
    assert first_step(run, 20) == 28, "the branch has begun there"
    assert first_step(RunDirectory(run.folder / "none")) == 0
