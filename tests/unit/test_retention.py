"""Which checkpoints are removed: by the history of the run, and never one that a run that diverges needs."""

import os
import shutil
from pathlib import Path

import pytest

from megapromoe.checkpoint import retention
from megapromoe.checkpoint.manifest import seal
from megapromoe.checkpoint.retention import newest_proven, prune, removable, remove_leftovers
from megapromoe.checkpoint.step_folders import StepFolder, folder_of, steps_in


def saved(root: Path, step: int, updates: int | None = None, run: str | None = "ours", name: int | None = None) -> Path:
    """A step folder with a sound manifest, and a file; named as the step `name`."""
    folder = folder_of(root, step if name is None else name)
    folder.mkdir(parents=True)
    facts = {"step": step, "updates": step if updates is None else updates, "run": run}
    (folder / "manifest.json").write_text(seal(facts))
    (folder / "rank-00000.safetensors").write_bytes(b"bytes")
    return folder


def run_of(steps: int, applied, keep: int = 2, keep_every: int = 0, save_every: int = 1, needed: int = 3) -> list[list]:
    """The steps that are kept after each save of a run; `applied(step)` says whether a step was an update."""
    kept: list[StepFolder] = []
    updates, history = 0, []
    for step in range(1, steps + 1):
        updates += applied(step)
        if step % save_every == 0:
            kept.append(StepFolder(Path(f"{step}"), step, updates))
            for checkpoint in removable(kept, updates, keep, keep_every, needed):
                kept.remove(checkpoint)
            history.append([checkpoint.step for checkpoint in kept])
    return history


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("save_every", [1, 2, 3, 10])
@pytest.mark.parametrize("skipped", [(), (7,), (7, 8), (5, 7, 9, 11)])
def test_a_run_always_keeps_the_newest_and_a_recent_proven_one(keep, save_every, skipped):
    applied = lambda step: step not in skipped  # noqa: E731, a table of steps
    for number, steps in enumerate(run_of(60, applied, keep=keep, save_every=save_every)):
        newest = (number + 1) * save_every
        assert steps[-min(keep, number + 1) :] == list(range(newest, 0, -save_every))[: min(keep, number + 1)][::-1]
        assert len(steps) <= keep + 2, "what is kept does not grow"
        updates = lambda step: sum(map(applied, range(1, step + 1)))  # noqa: E731
        proven = [s for s in range(save_every, newest + 1, save_every) if updates(s) <= updates(newest) - 3]
        if proven:
            # At most as old as a run that removes nothing has it, but for those that had to go before they were proven.
            held = [s for s in steps if updates(s) <= updates(newest) - 3]
            assert held and proven[-1] - held[-1] <= 3 * save_every


def test_skipped_steps_remove_nothing_proven():
    kept = run_of(40, lambda step: step <= 20)[-1]
    assert 17 in kept, "the newest with three updates after it, though twenty more were saved since"
    assert run_of(5, lambda step: step <= 2)[-1][:1] == [1], "nothing is proven; the first stays as the next to be"


def test_the_newest_proven_checkpoint():
    folders = [StepFolder(Path(f"{step}"), step, updates) for step, updates in ((5, 5), (6, 6), (8, 6), (9, None))]
    assert newest_proven(folders, 8, 3).step == 5 and newest_proven(folders, 9, 3).step == 8
    assert newest_proven(folders, 7, 3) is None


def test_multiples_stay():
    assert run_of(13, lambda step: True, keep_every=5)[-1] == [5, 10, 11, 12, 13]


def test_folders_of_another_history_are_neither_counted_nor_removed(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        saved(tmp_path, step)
    foreign = saved(tmp_path, 30, run="another")
    later = saved(tmp_path, 40)
    misnamed = saved(tmp_path, 3, name=99)
    damaged = saved(tmp_path, 50)
    (damaged / "manifest.json").write_text("{")
    prune(tmp_path, "ours", step=6, updates=6, keep=2, keep_every=0, needed=1)
    assert steps_in(tmp_path) == [5, 6, 30, 40, 50]
    assert all(path.exists() for path in (foreign, later, misnamed, damaged))


def test_of_a_link_the_link_is_removed(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2, 3, 4, 5):
        saved(root, step)
    target = shutil.move(folder_of(root, 1), elsewhere)
    folder_of(root, 1).symlink_to(elsewhere)
    prune(root, "ours", step=5, updates=5, keep=1, keep_every=0, needed=1)
    assert steps_in(root) == [4, 5] and not folder_of(root, 1).is_symlink()
    assert (Path(target) / "manifest.json").exists() and (Path(target) / "rank-00000.safetensors").exists()


def test_a_killed_removal_leaves_no_checkpoint_and_is_completed(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        saved(tmp_path, step)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, "ours", step=3, updates=3, keep=1, keep_every=0, needed=1)
    assert steps_in(tmp_path) == [2, 3] and len(os.listdir(tmp_path)) == 3
    (tmp_path / "step-00000004.writing").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


def test_a_removal_that_fails_is_logged(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        saved(tmp_path, step)

    def refused(source, target):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(retention.os, "rename", refused)
    prune(tmp_path, "ours", step=3, updates=3, keep=1, keep_every=0, needed=1)
    assert steps_in(tmp_path) == [1, 2, 3] and "step-00000001: cannot be removed: Permission denied" in caplog.text
