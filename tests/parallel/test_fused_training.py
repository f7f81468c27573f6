"""Training with the fused update: the same as with torch's AdamW at every stage, also from each other's checkpoints."""

from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import losses, state
from support.training_runs import train as train_run
from support.trajectory import Trajectory, deviation, deviations, train_uncompiled

from megapromoe.checkpoint.format import KINDS

SETTINGS = ("train.weight_decay=0.1", "train.ema_decay=[0.5,0.9]", "train.ema_warmup=true")
LIMIT = 1e-5


def trajectories(folder: Path, world: int, *overrides: str) -> list[Trajectory]:
    """Of the fused update and of torch's."""
    results = []
    for backend in ("fused", "torch"):
        (folder / backend).mkdir()
        words = (*SETTINGS, *overrides, f"train.adamw_backend={backend}")
        results.append(run(world, train_uncompiled, words, str(folder / backend), 4)[0])
    return results


# ---- the same training


@pytest.mark.parametrize(
    "world, overrides",
    [
        (2, ("train.deepspeed=fp32_zero2", "parallel.ep=2", "train.accumulation=2")),
        full(1, ("train.deepspeed=fp32_zero1", "train.max_grad_norm=0")),
        full(4, ("train.deepspeed=fp32_zero1", "parallel.tp=2", "parallel.ep=2", "train.accumulation=2")),
        full(4, ("train.deepspeed=fp32_zero3", "parallel.ep=2", "train.accumulation=2")),
        full(8, ("train.deepspeed=fp32_zero2", "parallel.ep=2", "model.num_experts=6")),
    ],
)
def test_it_trains_as_torch_does(tmp_path, world, overrides):
    for kind, (off, place) in deviations(*trajectories(tmp_path, world, *overrides)).items():
        assert off <= 1, f"{kind} deviate {off:.2g} times the limit at {place}"


@pytest.mark.full
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_it_trains_as_torch_does_in_bf16(tmp_path, zero):
    fused, torchs = trajectories(
        tmp_path, 2, f"train.deepspeed=bf16_zero{zero}", "parallel.ep=2", "train.accumulation=2"
    )
    assert fused.losses == pytest.approx(torchs.losses, rel=1e-3)
    for kind in ("parameters", "averages"):
        assert deviation(getattr(fused, kind), getattr(torchs, kind))[0] <= 1, kind


# ---- checkpoints


def steps(folder: str, *overrides: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        train_run(folder, *overrides)


@pytest.mark.full
@pytest.mark.parametrize("before, after", [("torch", "fused"), ("fused", "torch")])
def test_each_resumes_from_the_others_checkpoint_at_another_layout(tmp_path, before, after):
    """Six steps, the first of them with a warm-up of the rate; the last three have another update, layout and stage."""
    settings = (*SETTINGS, "train.warmup=3")
    first = ("train.deepspeed=fp32_zero1", "parallel.ep=2")
    second = ("train.deepspeed=fp32_zero2", "parallel.tp=2", "parallel.ep=2")
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run(2, steps, str(straight), *settings, *first, "train.adamw_backend=torch")
    run(2, steps, str(moved), *settings, *first, f"train.adamw_backend={before}", "train.steps=3")
    run(4, steps, str(moved), *settings, *second, f"train.adamw_backend={after}", "train.steps=6")
    assert losses(moved) == pytest.approx(losses(straight), rel=LIMIT)
    expected, actual = state(straight, 6), state(moved, 6)
    assert {kind for kind, _ in actual} == set(KINDS)
    for kind in KINDS:
        pairs = [(actual[k, name], tensor) for (k, name), tensor in expected.items() if k == kind]
        norm = torch.stack([tensor.norm() for _, tensor in pairs]).norm()
        assert all((ours - theirs).norm() <= LIMIT * (theirs.norm() + 0.1 * norm) for ours, theirs in pairs), kind
