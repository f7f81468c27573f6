"""Snapshots of averaged weights: found by step, read as weights, never taken for checkpoints, moved with a branch."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden_states import random_state

from megapromoe.checkpoint.format import KINDS, Checkpoint, CheckpointError, commit, write_rank
from megapromoe.checkpoint.history import complete_moves, leave_branch, left_branches
from megapromoe.checkpoint.retention import remove_leftovers
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import choose_weights, readable_steps, remove_later
from megapromoe.checkpoint.step_folders import folder_of, snapshot_of, steps_in
from megapromoe.checkpoint.step_folders import snapshot_steps as steps_of
from megapromoe.cli import main
from megapromoe.config.options import to_dict
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.state import model_shapes
from megapromoe.conversion.stream import ConversionError
from megapromoe.sampling.run_model import load_model

CONFIG = resolve("digits", overrides=["model.hidden_size=16", "model.depth=2", "model.heads=2", "model.num_experts=2"])

AVERAGES = ("ema",)


def save(run: RunDirectory, step: int, kinds: tuple[str, ...] = KINDS, branch: str = "main") -> Path:
    """A checkpoint, or a snapshot, of random tensors that depend on the kind and not on the folder."""
    shapes, _ = model_shapes(CONFIG.model)
    state = random_state(CONFIG)
    final = folder_of(run.checkpoints, step) if kinds == KINDS else snapshot_of(run.snapshots, step)
    staging = final.with_name(final.name + ".writing")
    staging.mkdir(parents=True)
    tensors = {f"{kind}/{name}@0": (state.read(kind, name) + step).view(-1) for kind in kinds for name in shapes}
    parts = []
    for name, shape in shapes.items():
        full_range = [[0, n] for n in shape]
        parts.append([name, 0, torch.Size(shape).numel(), [list(shape), [[full_range, full_range]]]])
    assert not write_rank(staging, 0, tensors, parts, step)
    facts = {"step": step, "updates": step, "run": "abc", "branch": branch, "config": to_dict(CONFIG), "buffers": []}
    facts |= {"shapes": {name: list(shape) for name, shape in shapes.items()}}
    commit(staging, final, 1, facts if kinds == KINDS else facts | {"kinds": list(kinds)}, 5)
    return final


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 20 and 40 and snapshots of steps 10, 20, 30, 40 and 50."""
    run = RunDirectory(tmp_path / "run")
    for step in (20, 40):
        save(run, step)
    for step in (10, 20, 30, 40, 50):
        save(run, step, AVERAGES)
    run.config_file.write_text(to_yaml(CONFIG))
    return run


def test_averages_of_a_step_are_read_from_its_snapshot_and_weights_from_its_checkpoint(run):
    assert readable_steps(run.checkpoints, "ema") == [10, 20, 30, 40, 50]
    assert readable_steps(run.checkpoints, "master") == [20, 40]
    assert choose_weights(run.checkpoints, 30, "ema") == snapshot_of(run.snapshots, 30)
    assert choose_weights(run.checkpoints, 20, "ema") == snapshot_of(run.snapshots, 20)
    assert choose_weights(run.checkpoints, 20, "master") == folder_of(run.checkpoints, 20)
    assert choose_weights(run.checkpoints, None, "ema") == folder_of(run.checkpoints, 40), "the newest checkpoint"
    with pytest.raises(CheckpointError, match="has no such checkpoint.* snapshots .*of steps 10, 20, 30, 40, 50"):
        choose_weights(run.checkpoints, 30, "master")
    model, _, step = load_model(run.folder, 30)
    name, parameter = next(iter(model.named_parameters()))
    assert step == 30 and torch.equal(parameter, random_state(CONFIG).read("ema", name) + 30)


def test_a_run_with_only_snapshots_lists_them(run):
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="no complete checkpoint.* --weights ema, of steps 10, 20"):
        load_model(run.folder)
    assert load_model(run.folder, 10)[2] == 10


@pytest.mark.parametrize("name", ["average-00000030", "step-00000030"])
def test_a_snapshot_is_never_taken_for_a_checkpoint(run, caplog, name):
    copy = shutil.copytree(snapshot_of(run.snapshots, 30), run.checkpoints / name)
    assert steps_in(run.checkpoints) == [20, 40]
    assert (
        name.startswith("average")
        or "is a snapshot of averaged weights, from which training cannot resume" in caplog.text
    )
    with pytest.raises(CheckpointError, match="is a snapshot of ema alone and has no master"):
        Checkpoint(copy).logical("master", next(iter(model_shapes(CONFIG.model)[0])))


def test_a_damaged_snapshot_or_a_copy_of_another_step_is_named(run):
    file = snapshot_of(run.snapshots, 30) / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="average-00000030/rank-00000.safetensors: bytes changed"):
        load_model(run.folder, 30)
    shutil.copytree(snapshot_of(run.snapshots, 10), snapshot_of(run.snapshots, 60))
    with pytest.raises(CheckpointError, match="is of step 10, .* rename it to average-00000010"):
        load_model(run.folder, 60)


def test_files_of_a_killed_save_are_no_snapshot_and_are_removed(run):
    left_over = shutil.copytree(snapshot_of(run.snapshots, 30), run.snapshots / "average-00000070.writing")
    assert steps_of(run.snapshots) == [10, 20, 30, 40, 50]
    remove_leftovers(run.snapshots)
    assert not left_over.exists() and steps_of(run.snapshots) == [10, 20, 30, 40, 50]


def test_snapshots_of_later_steps_move_with_the_branch_that_is_left(run):
    left = leave_branch(run, 20, "asked")
    assert left.steps == (40,) and left.snapshots == (30, 40, 50)
    assert steps_of(run.snapshots) == [10, 20] and steps_of(left.folder / "snapshots") == [30, 40, 50]
    assert left_branches(run) == [left]
    with pytest.raises(CheckpointError):
        load_model(run.folder, 30)


def test_snapshots_after_the_newest_checkpoint_become_a_branch_only_with_the_step_option(run):
    assert leave_branch(run, 40, "a crash") is None
    save(run, 60, AVERAGES, branch="second")
    left = leave_branch(run, 40, "asked", requested=True)
    assert (left.name, left.steps, left.snapshots) == ("second", (), (50, 60))
    assert steps_of(run.snapshots) == [10, 20, 30, 40]


def test_a_crash_does_the_later_steps_again_and_its_snapshots_too(run):
    remove_later(run.checkpoints, 40)
    assert steps_of(run.snapshots) == [10, 20, 30, 40]


def test_a_kill_while_a_branch_is_left_loses_no_snapshot(run, monkeypatch):
    import megapromoe.checkpoint.history as history

    real, calls = history.os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(history.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        leave_branch(run, 20, "asked")
    monkeypatch.undo()
    complete_moves(run)
    (left,) = left_branches(run)
    assert steps_of(run.snapshots) == [10, 20] and steps_of(left.folder / "snapshots") == [30, 40, 50]


def test_convert_and_inspect_read_a_snapshot(run, tmp_path, capsys):
    state = open_state(run.folder, step=30)
    assert state.kinds == AVERAGES and state.updates == 0 and state.average.updates == 30
    command = ["convert", str(run.folder), str(tmp_path / "a.safetensors"), "--to", "safetensors", "--step", "30"]
    assert main([*command, "--weights", "ema"]) == 0
    name = next(iter(state.shapes))
    assert torch.equal(open_state(tmp_path / "a.safetensors").read("ema", name), state.read("ema", name))
    assert main([*command, "--weights", "master", "--overwrite"]) == 1
    assert "has ema only" in capsys.readouterr().err
    assert main(["convert", str(run.folder), str(tmp_path / "new"), "--to", "ours", "--step", "30"]) == 0
    assert "a snapshot with averages only: they are used for the trained weights too" in capsys.readouterr().out
    assert torch.equal(open_state(tmp_path / "new").read("master", name), state.read("ema", name))
    assert main(["inspect", str(snapshot_of(run.snapshots, 30))]) == 0
    printed = capsys.readouterr().out
    assert "kinds: ema" in printed and "step 30 (30 updates)" in printed
    assert main(["inspect", str(run.folder)]) == 0
    assert "snapshots of its averaged weights: 10, 20, 30, 40, 50" in capsys.readouterr().out


def test_a_run_of_snapshots_alone_has_taken_steps(run):
    shutil.rmtree(run.checkpoints)
    run.environment.write_text("[]")
    assert run.took_steps()
    shutil.rmtree(run.snapshots)
    assert not run.took_steps()


def test_a_full_checkpoint_is_converted_where_a_step_has_both(run):
    assert open_state(run.folder, step=20).kinds == KINDS
    with pytest.raises(ConversionError, match="is of step 30"):
        open_state(snapshot_of(run.snapshots, 30), step=20)


def test_a_config_of_snapshots_is_checked(run):
    run.config_file.write_text(to_yaml(replace(CONFIG, model=replace(CONFIG.model, top_k=2))))
    with pytest.raises(CheckpointError, match="is not the config that average-00000030 was trained with"):
        load_model(run.folder, 30)
