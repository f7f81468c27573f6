"""Training with Muon: against a plain reference, with the fused AdamW, in bf16, and its checkpoints.

`test_equality.py` has the layouts.
"""

from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import QUICK, losses
from support.training_runs import train as train_run
from support.trajectory import Trajectory, deviation, deviations, small, stir, train

import megapromoe.training.loop as loop
from megapromoe.checkpoint.disk_space import disk
from megapromoe.checkpoint.format import MOMENTS, MOMENTUM, Checkpoint, CheckpointError
from megapromoe.checkpoint.manager import restore, resume
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build

MUON = ("train.optimizer=muon", "train.weight_decay=0.1")
CLIPPED = "train.max_grad_norm=0.1"


# ---- a plain loop: float64, a matrix at a time


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class PlainOptimizer:
    """Muon for the parameters named as matrices of attention, MLPs and experts, AdamW for all others, clipped."""

    def __init__(self, weights: dict[str, torch.Tensor], config):
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.state = {name: (0.0, 0.0) for name in weights}
        self.train, self.updates = config.train, 0

    @staticmethod
    def stacked(name: str) -> int:
        """How many matrices a parameter stacks; 0 for those of AdamW."""
        if name.endswith("attn.qkv.weight"):
            return 3
        is_hidden = name.endswith(("attn.proj.weight", "fc1.weight", "fc2.weight"))
        return 1 if is_hidden else 0

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        self.updates += 1
        t, gradients = self.train, {name: g.double() for name, g in gradients.items()}
        adamw = [g for name, g in gradients.items() if not self.stacked(name)]
        factor = min(1.0, t.max_grad_norm / float(torch.stack([g.norm() for g in adamw]).norm()))
        for name, g in gradients.items():
            w, (first, second) = self.weights[name], self.state[name]
            w *= 1 - t.lr * (t.muon_lr / t.lr if self.stacked(name) else 1) * t.weight_decay
            if self.stacked(name):
                first = 0.95 * first + 0.05 * g
                direction = 0.05 * g + 0.95 * first
                for matrix, of in self.matrices(name, w, direction):
                    matrix -= t.muon_lr * 0.2 * max(matrix.shape) ** 0.5 * newton_schulz(of)
            else:
                g = factor * g
                first, second = t.beta1 * first + (1 - t.beta1) * g, t.beta2 * second + (1 - t.beta2) * g * g
                unbiased = first / (1 - t.beta1**self.updates), second / (1 - t.beta2**self.updates)
                w -= t.lr * unbiased[0] / (unbiased[1].sqrt() + t.eps)
            self.state[name] = first, second

    def matrices(self, name: str, *tensors: torch.Tensor):
        rows = tensors[0].shape[-2] // self.stacked(name)
        return zip(*(tensor.view(-1, rows, tensor.shape[-1]) for tensor in tensors), strict=True)


def plain_deviations() -> tuple[list[float], list[str]]:
    """Of three steps on one process: the largest deviation of a parameter from the plain one, relative to its step."""
    config = small(*MUON, CLIPPED, "train.muon_lr=0.02", "train.deepspeed=fp32_zero0", "train.global_batch=8")
    mesh = make_mesh()
    model = build(config, mesh)
    stir(model, mesh)
    plain = PlainOptimizer({name: p.detach().clone() for name, p in model.named_parameters()}, config)
    start = {name: weight.clone() for name, weight in plain.weights.items()}
    engine = Engine(model, config, mesh)
    generator, worst = torch.Generator().manual_seed(0), []
    for _ in range(3):
        x, t = torch.randn(8, 4, 8, 8, generator=generator), 1000 * torch.rand(8, generator=generator)
        y = torch.randint(10, (8,), generator=generator)

        def loss(prediction, auxiliary):
            total = prediction.square().mean() + auxiliary.total()
            return total, total.detach()

        report = engine.micro_step(x, t, y, 8, loss=loss)
        shapes = {name: p.shape for name, p in engine.module.named_parameters()}
        gradients = {piece.name: g.clone().view(shapes[piece.name]) for piece, g in engine.reduced_gradients()}
        engine.step(config.train.lr, report)
        plain.step(gradients)
        off = 0.0
        for name, p in engine.module.named_parameters():
            moved = (plain.weights[name] - start[name]).norm()
            off = max(off, float((p.detach() - plain.weights[name]).norm() / moved))
        worst.append(off)
    hidden = sorted(engine.hidden_parameters)
    assert hidden == sorted(name for name in shapes if plain.stacked(name))
    engine.close()
    return worst, hidden


def test_training_is_that_of_a_plain_loop():
    """Clipping is active and acts on AdamW's part alone."""
    (worst, hidden) = run(1, plain_deviations)[0]
    assert len(hidden) == 2 * (2 + 2) + 2 * (2 + 2 * 3), "two dense blocks, two with experts, shared, unconditional"
    assert max(worst) < 1e-4, worst


# ---- the fused update, bf16, skipped steps


def trajectory(overrides: tuple[str, ...], folder: str) -> Trajectory | None:
    with torch.compiler.set_stance("force_eager"):  # spares the minutes of the compiler
        return train(overrides, folder, 4)


@pytest.mark.parametrize(
    "world, overrides",
    [
        full(3, ("train.deepspeed=fp32_zero1", "parallel.ep=3", "train.global_batch=18")),
        full(2, ("train.deepspeed=fp32_zero3", "train.accumulation=2")),
    ],
)
def test_beside_the_fused_adamw_it_trains_the_same(tmp_path, world, overrides):
    results = []
    for backend in ("fused", "torch"):
        (tmp_path / backend).mkdir()
        words = (*MUON, *overrides, "train.ema_decay=[0.5,0.9]", f"train.adamw_backend={backend}")
        results.append(run(world, trajectory, words, str(tmp_path / backend))[0])
    for kind, (off, place) in deviations(*results).items():
        assert off <= 1, f"{kind} deviate {off:.2g} times the limit at {place}"


@pytest.mark.full
@pytest.mark.parametrize("zero", [1, 3])
def test_in_bf16_at_two_ranks_as_at_one(tmp_path, zero):
    results = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        words = (*MUON, f"train.deepspeed=bf16_zero{zero}", f"parallel.ep={world}")
        results.append(run(world, train, words, str(tmp_path / str(world)), 4)[0])
    single, double = results
    assert double.losses == pytest.approx(single.losses, rel=2e-2)
    assert deviation(double.parameters, single.parameters)[0] < 3e-2 / 1e-5


def skipped(zero: int) -> list[bool]:
    """Whether all state stays as it is in a step without a finite gradient, and changes in the one after it."""
    config = small(*MUON, f"train.deepspeed=fp32_zero{zero}")
    mesh = make_mesh()
    engine = Engine(build(config, mesh), config, mesh)
    images = config.layout(mesh.world_size).micro_batch

    def step(factor: float) -> bool:
        x, y = torch.ones(images, 4, 8, 8), torch.zeros(images, dtype=torch.int64)

        def loss(prediction, auxiliary):
            total = prediction.square().mean() * factor + auxiliary.total()
            return total, total.detach()

        report = engine.micro_step(x, torch.ones(images), y, images, loss=loss)
        return engine.step(0.01, report).applied

    def state() -> list[torch.Tensor]:
        return [
            tensor.clone()
            for partition in engine.partitions
            for tensor in (partition.master.detach(), *engine.moments(partition).values())
        ]

    results = [step(1.0)]
    before = state()
    results.append(step(float("nan")))
    after = state()
    results.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    results.append(step(1.0))
    results.append(any(not torch.equal(a, b) for a, b in zip(after, state(), strict=True)))
    engine.close()
    return results


@pytest.mark.parametrize("zero", [0, 1])
def test_a_skipped_step_changes_nothing(zero):
    assert run(2, skipped, zero) == [[True, False, True, True, True]] * 2


# ---- checkpoints


def two_runs(folder: str, *overrides: str) -> None:
    train_run(folder, *MUON, *overrides)


def checkpoint(folder: Path, step: int) -> Checkpoint:
    opened = Checkpoint(folder_of(folder / "checkpoints", step))
    opened.verify()
    return opened


def entries(folder: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of a checkpoint: of each parameter those that its optimizer has."""
    opened = checkpoint(folder, step)
    kinds = {name: (MOMENTUM,) if name in opened.with_momentum else MOMENTS for name in opened.shapes}
    return {
        (kind, name): opened.logical(kind, name) for name in opened.shapes for kind in ("master", "ema", *kinds[name])
    }


@pytest.mark.full
def test_a_run_continues_at_another_layout(tmp_path):
    """To the bit at the same layout, within 1e-5 at another one; a checkpoint has one moment of Muon's parameters."""
    first = ("train.deepspeed=fp32_zero1", "parallel.ep=2", "model.num_experts=3")
    second = ("train.deepspeed=fp32_zero2", "parallel.ep=3", "model.num_experts=3", "train.global_batch=18")
    first = (*first, "train.global_batch=18")
    straight, same, moved = (tmp_path / name for name in ("straight", "same", "moved"))
    run(2, two_runs, str(straight), *first)
    for folder, world, layout in ((same, 2, first), (moved, 3, second)):
        run(2, two_runs, str(folder), *first, "train.steps=3")
        run(world, two_runs, str(folder), *layout, "train.steps=6")
    expected = entries(straight, 6)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in entries(same, 6).items())
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)
    norms = {
        kind: torch.stack([t.norm() for (k, _), t in expected.items() if k == kind]).norm() for kind, _ in expected
    }
    for (kind, name), tensor in entries(moved, 6).items():
        theirs = expected[kind, name]
        assert (tensor - theirs).norm() <= 1e-5 * (theirs.norm() + 0.1 * norms[kind]), (kind, name)
    opened = checkpoint(straight, 6)
    assert opened.kinds == ("master", "exp_avg", "exp_avg_sq", "ema", MOMENTUM)
    assert len(opened.with_momentum) == 24
    with pytest.raises(CheckpointError, match="is updated by Muon and has no exp_avg_sq, only momentum"):
        opened.logical("exp_avg_sq", min(opened.with_momentum))
    files = sum(file.stat().st_size for file in opened.folder.glob("*.safetensors"))
    planned = disk(small(*QUICK, *MUON, *first)).checkpoint
    assert planned < files < 1.05 * planned


def allowing_another_optimizer(folder: str, *overrides: str) -> None:
    train_with = loop.train
    loop.train = lambda *arguments: train_with(*arguments, allow=("train.optimizer",))
    train_run(folder, *overrides)


def restored_momentum(checkpoint_folder: str) -> bool:
    """Whether a run of Muon takes the moments of AdamW's parameters from a checkpoint and begins momenta at zero."""
    config = small(*MUON, "train.deepspeed=fp32_zero0")
    mesh = make_mesh()
    engine = Engine.new(config, mesh, "cpu")
    ema, opened = EMA(engine, config.train.ema_decays), Checkpoint(Path(checkpoint_folder))
    for partition in engine.partitions:
        for tensor in engine.moments(partition).values():
            tensor.fill_(7.0)
    restore(engine, ema, opened, 3)
    right = True
    for partition in engine.partitions:
        (piece,), moments = partition.pieces, engine.moments(partition)
        for kind, tensor in moments.items():
            stored = torch.zeros_like(tensor) if kind == MOMENTUM else opened.logical(kind, piece.name).view(-1)
            right = right and torch.equal(tensor, stored) and partition.uses_muon == (kind == MOMENTUM)
    engine.close()
    return right


@pytest.mark.full
def test_changes_of_the_optimizer(tmp_path):
    """AdamW's run continues with Muon if that is allowed; Muon's with AdamW does not, and a conversion helps."""
    adamw, muon = tmp_path / "adamw", tmp_path / "muon"
    short = ("train.steps=3", "train.deepspeed=fp32_zero0")
    run(1, train_run, str(adamw), *short, "train.weight_decay=0.1")
    run(1, two_runs, str(muon), *short)
    assert run(1, restored_momentum, str(folder_of(adamw / "checkpoints", 3))) == [True]
    engine_state = open_state(muon)
    assert engine_state.kinds == ("master", "ema") and engine_state.known_updates == 3
    assert any("its optimizer was Muon" in note for note in engine_state.notes)
    notes = export(engine_state, tmp_path / "converted", "ours")
    assert any("moments" in note for note in notes)
    converted = Checkpoint(folder_of(tmp_path / "converted" / "checkpoints", 3))
    assert not converted.with_momentum and converted.manifest["updates"] == 0
    for name in converted.shapes:
        assert torch.equal(converted.logical("master", name), checkpoint(muon, 3).logical("master", name))
        assert not converted.logical("exp_avg", name).any()
    assert run(1, restored_momentum, str(converted.folder)) == [True]
    more = ("train.steps=4", "train.deepspeed=fp32_zero0", "train.weight_decay=0.1")
    run(1, allowing_another_optimizer, str(tmp_path / "converted"), *more)
    assert checkpoint(tmp_path / "converted", 4).kinds == ("master", "exp_avg", "exp_avg_sq", "ema")


def refusal(folder: str) -> str:
    """Of a checkpoint of Muon for AdamW."""
    config = small("train.deepspeed=fp32_zero0")
    engine = Engine.new(config, make_mesh(), "cpu")
    try:
        resume(Path(folder), engine, EMA(engine, (0.5,)))
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_adamw_refuses_a_checkpoint_of_muon(tmp_path):
    run(1, two_runs, str(tmp_path), "train.steps=1", "train.deepspeed=fp32_zero0")
    (message,) = run(1, refusal, str(tmp_path / "checkpoints"))
    assert "its optimizer was Muon for 24 parameters" in message
    assert "convert RUN OTHER --to ours" in message and "--allow train.optimizer" in message
