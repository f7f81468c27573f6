"""Going back in a run: the branch that runs is the run, in its checkpoints, its log and its messages."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from support.levels import full
from support.processes import WorkerFailed, run
from support.training_runs import losses, state, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megapromoe.training.loop as loop
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.history import left_branches
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of, steps_in


def start(folder: str, overrides: tuple[str, ...], stop_at: int = 0, options=None) -> None:
    """`train` with the options of a command line; SIGTERM after the step `stop_at`."""
    real_train, real_rate = loop.train, loop.learning_rate
    loop.train = lambda config, where, launch: real_train(config, where, launch, **(options or {}))

    def learning_rate(t, step):
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_rate(t, step)

    loop.learning_rate = learning_rate
    train(folder, "train.save_every=5", "train.keep_last=2", "train.keep_every=10", *overrides)


def steps_logged(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder) -> dict[int, float]:
    """The losses that TensorBoard shows of a run, by step."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("total_loss")}


@pytest.mark.full
def test_a_branch_is_stopped_and_resumed_by_the_same_command(tmp_path):
    folder = tmp_path / "run"
    branch = ("train.lr=1e-3", "train.steps=40")
    run(1, start, str(folder), ("train.steps=40",))
    assert steps_in(folder / "checkpoints") == [10, 20, 30, 35, 40]
    old = state(folder, 40)
    with pytest.raises(WorkerFailed, match="asked to stop: step 28 of 40 is saved, repeat the command"):
        run(1, start, str(folder), branch, 28, dict(from_step=20))
    assert steps_in(folder / "checkpoints") == [10, 20, 25, 28]
    (left,) = left_branches(RunDirectory(folder))
    assert steps_in(left.folder / "checkpoints") == [30, 35, 40] and steps_logged(left.folder) == list(range(21, 41))
    assert steps_logged(folder) == list(range(1, 29))
    run(1, start, str(folder), branch, 0, dict(from_step=20))
    assert steps_logged(folder) == list(range(1, 41))
    manifest = Checkpoint(folder_of(folder / "checkpoints", 40)).manifest
    assert manifest["branch"] == "step-20" and manifest["config"]["train"]["lr"] == 1e-3

    # The same branch without a stop, in a copy of the run as it was: resuming was exact.
    straight = tmp_path / "straight"
    shutil.copytree(folder, straight)
    shutil.rmtree(straight / "checkpoints")
    shutil.copytree(left.folder / "checkpoints", straight / "checkpoints")
    shutil.copytree(folder_of(folder / "checkpoints", 20), folder_of(straight / "checkpoints", 20))
    shutil.rmtree(straight / "branches")
    run(1, start, str(straight), branch, 0, dict(from_step=20))
    ours, theirs = state(folder, 40), state(straight, 40)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not all(torch.equal(ours[key], old[key]) for key in ours)
    shown = board(folder)
    assert list(shown) == steps_logged(folder) and list(shown.values()) == pytest.approx(losses(folder), rel=1e-6)

    run(1, start, str(folder), ("train.lr=5e-4", "train.steps=22"), 0, dict(from_step=20, fork="lowest"))
    assert steps_in(folder / "checkpoints") == [10, 20, 22] and len(left_branches(RunDirectory(folder))) == 2


@pytest.mark.full
def test_a_damaged_newer_checkpoint_is_moved_not_replaced(tmp_path):
    run(2, train, str(tmp_path), "parallel.ep=2")
    file = folder_of(tmp_path / "checkpoints", 6) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    spoilt = file.read_bytes()
    run(2, train, str(tmp_path), "parallel.ep=2")
    (left,) = left_branches(RunDirectory(tmp_path))
    assert "rank-00001.safetensors: has" in left.reason
    assert (folder_of(left.folder / "checkpoints", 6) / file.name).read_bytes() == spoilt
    Checkpoint(folder_of(tmp_path / "checkpoints", 6)).verify()


@pytest.mark.full
def test_a_folder_with_the_name_of_a_new_checkpoint_is_kept(tmp_path):
    run(1, train, str(tmp_path), "train.steps=3")
    copy = shutil.copytree(folder_of(tmp_path / "checkpoints", 3), folder_of(tmp_path / "checkpoints", 6))
    manifest = (copy / "manifest.json").read_bytes()
    run(1, train, str(tmp_path))
    assert steps_in(tmp_path / "checkpoints") == [3, 6]
    assert (tmp_path / "checkpoints" / "step-00000006.replaced" / "manifest.json").read_bytes() == manifest


# ---- checkpoints of other runs


def test_a_checkpoint_of_another_run_needs_allow(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    run(1, train, str(ours), "train.steps=3")
    run(1, train, str(other), "train.lr=0.02")
    shutil.copytree(folder_of(other / "checkpoints", 6), folder_of(ours / "checkpoints", 6))
    with pytest.raises(WorkerFailed, match=r"step-00000006: is of another run.*\n  - run: .* --allow run"):
        run(1, train, str(ours), "train.steps=9")
    assert steps_in(ours / "checkpoints") == [3, 6] and len(losses(ours)) == 3
    run(1, start, str(ours), ("train.steps=9", "train.save_every=3"), 0, dict(allow=("run",)))
    assert steps_in(ours / "checkpoints") == [3, 6, 9], "its own are counted and removed, the other's is not"
    run(1, train, str(ours), "train.steps=12")


@pytest.mark.parametrize("setting", ["data.seed=7", full("data.size=48"), full("train.seed=3")])
def test_a_checkpoint_of_other_settings_needs_allow(setting, tmp_path):
    """As when config.yaml was replaced by another run's."""
    key, _, value = setting.partition("=")
    run(1, train, str(tmp_path), "train.steps=3")
    config = (tmp_path / "config.yaml").read_text()
    section, name = key.split(".")
    changed = re.sub(rf"(?ms)^({section}:.*?^  {name}: )[^\n]*", rf"\g<1>{value}", config, count=1)
    assert changed != config
    (tmp_path / "config.yaml").write_text(changed)
    with pytest.raises(WorkerFailed, match=rf"step-00000003: .*\n  - {key}: .*--allow {key}"):
        run(1, train, str(tmp_path), setting)
    run(1, start, str(tmp_path), (setting, "train.steps=6"), 0, dict(allow=(key,)))
    assert steps_in(tmp_path / "checkpoints")[-1] == 6


# ---- steps that are skipped


def diverging(folder: str, overrides: tuple[str, ...], first: int, last: int = 10**9) -> None:
    """Trains; the loss of steps `first` to `last` is not finite."""
    real = loop.learning_rate
    steps = []

    def learning_rate(t, step):
        steps[:] = [step + 2]  # the step after this one
        return real(t, step)

    loop.learning_rate = learning_rate
    real_objective = loop.make_objective

    class Objective:
        def __init__(self, config):
            self.real = real_objective(config)
            self.corrupt = self.real.corrupt

        def loss(self, *arguments):
            now = steps[0] if steps else 1
            return self.real.loss(*arguments) * (float("inf") if first <= now <= last else 1.0)

    loop.make_objective = Objective
    start(folder, ("train.save_every=1", "train.keep_last=2", "train.keep_every=0", *overrides))


@pytest.mark.full
def test_a_run_that_diverges_from_the_start_reports_that_no_checkpoint_is_proven(tmp_path):
    with pytest.raises(WorkerFailed, match=r"step 5: 3 steps in a row .*start a new run, with another --run-dir"):
        run(2, diverging, str(tmp_path), ("parallel.ep=2",), 3)
    manifest = Checkpoint(folder_of(tmp_path / "checkpoints", 5)).manifest
    assert (manifest["step"], manifest["updates"], manifest["skipped_in_a_row"]) == (5, 2, 3)


@pytest.mark.full
def test_a_run_that_diverges_names_a_proven_checkpoint_and_the_command(tmp_path):
    with pytest.raises(WorkerFailed) as failed:
        run(2, diverging, str(tmp_path), ("parallel.ep=2", "train.steps=30"), 21)
    command = re.search(r"megapromoe train --config \S+ --run-dir \S+ --step (\d+) train.lr=(\S+)", str(failed.value))
    assert command and command[1] == "17", "three updates came after it: 18, 19, 20"
    assert command[0] in (tmp_path / "diverged.txt").read_text(), "launchers see that repeating cannot help"
    assert steps_in(tmp_path / "checkpoints")[0] == 17
    run(2, start, str(tmp_path), ("parallel.ep=2", "train.steps=30", f"train.lr={command[2]}"), 0, dict(from_step=17))
    assert steps_logged(tmp_path) == list(range(1, 31))
    (left,) = left_branches(RunDirectory(tmp_path))
    assert 23 in left.steps and not (tmp_path / "diverged.txt").exists()


def test_a_run_that_ends_with_skipped_steps_fails(tmp_path):
    with pytest.raises(WorkerFailed, match="step 6: the run is complete, but the last 2 steps had no usable grad"):
        run(1, diverging, str(tmp_path), (), 5)
    manifest = Checkpoint(folder_of(tmp_path / "checkpoints", 6)).manifest
    assert (manifest["updates"], manifest["skipped_in_a_row"]) == (4, 2)


@pytest.mark.full
def test_skipped_steps_followed_by_good_ones_change_nothing(tmp_path):
    run(1, diverging, str(tmp_path), ("train.steps=9",), 4, 5)
    assert Checkpoint(folder_of(tmp_path / "checkpoints", 9)).manifest["updates"] == 7


@pytest.mark.full
def test_the_stable_part_of_a_schedule_is_extended(tmp_path):
    """From a checkpoint before the decay with more steps: the bits of a run that had these steps from the start."""
    wsd = ("train.schedule=wsd", "train.decay_start=0.5", "train.warmup=2", "train.keep_last=9")
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    run(1, start, str(straight), (*wsd, "train.steps=20"))
    run(1, start, str(extended), (*wsd, "train.steps=10"))
    assert steps_in(extended / "checkpoints") == [5, 10]
    run(1, start, str(extended), (*wsd, "train.steps=20"), 0, dict(from_step=5))
    assert losses(extended) == losses(straight)
    expected = state(straight, 20)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state(extended, 20).items())
