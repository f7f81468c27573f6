"""Several decays at once in real runs: the bits of runs with one decay each, over layouts, kills and changed lists."""

import shutil
from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import same_state, train

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of, snapshot_of

DECAYS = ("0.2", "0.9")  # with warm-up, 0.2 is reached at the second update
SHORT = ("train.steps=3", "train.save_every=2", "train.snapshot_every=3", "train.ema_warmup=true")

# ranks, overrides
TWO = (2, "parallel.ep=2", "train.deepspeed=fp32_zero1")
FOUR = (4, "parallel.tp=2", "parallel.ep=2", "train.deepspeed=fp32_zero2")
CASES = [
    full(TWO),
    full(FOUR),
    full((4, "parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true", "train.deepspeed=fp32_zero3")),
    full((2, "parallel.ep=1", "train.deepspeed=bf16_zero1")),
    full((1, "train.deepspeed=fp32_zero0")),
]


def train_all(folder: str, *overrides: str) -> None:
    """A run with both decays, and one with each of them."""
    for decays in (f"[{','.join(DECAYS)}]", *DECAYS):
        train(f"{folder}/{decays}", *SHORT, f"train.ema_decay={decays}", *overrides)


def checkpoint(folder: Path, step: int = 3) -> Checkpoint:
    opened = Checkpoint(folder_of(folder / "checkpoints", step))
    opened.verify()
    return opened


def kind_equals(checkpoint_a: Checkpoint, kind: str, other: Checkpoint, other_kind: str) -> bool:
    return all(torch.equal(checkpoint_a.logical(kind, name), other.logical(other_kind, name)) for name in other.shapes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} ranks, {', '.join(case[1:])}")
def test_each_average_is_that_of_a_run_with_its_decay_alone(tmp_path, case):
    """In checkpoints, in snapshots, and after a kill; all other state is that of either run."""
    world, *overrides = case
    run(world, train_all, str(tmp_path), *overrides)
    folder, *alone = (tmp_path / decays for decays in ("[0.2,0.9]", *DECAYS))
    both, first, second = map(checkpoint, (folder, *alone))
    assert both.kinds == ("master", "exp_avg", "exp_avg_sq", "ema", "ema=0.9")
    assert same_state(folder, alone[0], 3)
    assert kind_equals(both, "ema=0.9", second, "ema")
    assert not kind_equals(both, "ema", second, "ema")
    assert [a.initial_share for a in both.averages.values()] == [
        other.averages["ema"].initial_share for other in (first, second)
    ]
    assert "ema_averages" not in first.manifest

    snapshot = Checkpoint(snapshot_of(folder / "snapshots", 3))
    assert snapshot.kinds == ("ema", "ema=0.9")
    assert all(kind_equals(snapshot, kind, both, kind) for kind in snapshot.kinds)

    killed = shutil.copytree(folder, tmp_path / "killed")
    shutil.rmtree(folder_of(killed / "checkpoints", 3))
    run(world, train, str(killed), *SHORT, "train.ema_decay=[0.2,0.9]", *overrides)
    continued = checkpoint(killed)
    assert all(kind_equals(continued, kind, both, kind) for kind in both.kinds)
    assert continued.manifest["ema_averages"] == both.manifest["ema_averages"]


def change_the_list(folder: str) -> None:
    """Two steps with one decay, two with another before it, two with that one alone; each step is saved."""
    every = ("train.save_every=1", "train.snapshot_every=0", "train.keep_last=9", "parallel.ep=1")
    for steps, decays in ((2, "0.9"), (4, "[0.5,0.9]"), (6, "0.5")):
        train(folder, *every, f"train.steps={steps}", f"train.ema_decay={decays}")
    train(f"{folder}/straight", *every, "train.steps=4", "train.ema_decay=0.9")


@pytest.mark.full
def test_an_average_may_be_added_and_removed_at_a_resume(tmp_path):
    """An added one begins at the weights of its step; the others go on as if nothing had been added."""
    run(1, change_the_list, str(tmp_path / "run"))
    at = {step: checkpoint(tmp_path / "run", step) for step in range(1, 7)}
    for name in at[2].shapes:
        average = at[2].logical("master", name)
        for step in range(3, 7):
            average = average.lerp(at[step].logical("master", name), 0.5)
            assert torch.equal(at[step].logical("ema", name), average), (name, step)
    assert kind_equals(at[4], "ema=0.9", checkpoint(tmp_path / "run" / "straight", 4), "ema")
    assert [list(at[step].averages) for step in (2, 4, 6)] == [["ema"], ["ema", "ema=0.9"], ["ema"]]
    shares = [[average.initial_share for average in at[step].averages.values()] for step in (2, 4, 6)]
    assert shares == [[pytest.approx(0.9**2)], [0.5**2, pytest.approx(0.9**4)], [0.5**4]]
    assert at[6].averages["ema"].updates == 4


@pytest.mark.full
def test_all_averages_go_on_at_another_layout(tmp_path):
    listed = (*SHORT, "train.ema_decay=[0.2,0.9]")
    run(2, train, str(tmp_path / "run"), *listed, *TWO[1:], "train.steps=2")
    run(4, train, str(tmp_path / "run"), *listed, *FOUR[1:])
    run(2, train, str(tmp_path / "straight"), *listed, *TWO[1:])
    moved, straight = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "straight")
    for kind in ("ema", "ema=0.9"):
        expected = {name: straight.logical(kind, name) for name in straight.shapes}
        norm_of_all = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
        for name, tensor in expected.items():
            assert (moved.logical(kind, name) - tensor).norm() <= 1e-5 * tensor.norm() + 1e-6 * norm_of_all, (
                kind,
                name,
            )
