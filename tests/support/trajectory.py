"""A few training steps of a small model at any layout, and everything they leave behind, in logical terms."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megapromoe.checkpoint.format import Checkpoint, commit, write_rank
from megapromoe.checkpoint.local_state import copy_to_host
from megapromoe.checkpoint.manager import CheckpointManager
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.checkpoint.weights import AVERAGE, average_kinds
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Synthetic
from megapromoe.data.sample_stream import Batch, SampleStream
from megapromoe.data.sources import open_teacher_features
from megapromoe.diffusion.objectives import make_objective
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build
from megapromoe.nn.text_condition import TextCondition

# Adam turns rounding noise in gradients that are zero by mathematics into full steps; a large eps damps that.
SMALL = (
    "model.hidden_size=32",
    "model.depth=4",
    "model.heads=4",
    "model.input_size=8",
    "model.in_channels=4",
    "model.num_classes=10",
    "model.num_experts=4",
    "model.score_function=sigmoid",
    "model.rcl_weight=0.1",
    "data.source=synthetic",
    "data.size=64",
    "data.condition_dropout=0.25",
    "train.global_batch=16",
    "train.lr=0.01",
    "train.eps=0.001",
    "train.ema_decay=0.5",
    "train.max_grad_norm=0.5",
    "train.deepspeed=fp32_zero1",
)


@dataclass
class Trajectory:
    """Per-step losses and norms, and logical tensors: of the first step's gradient, and after the last step.

    Names of averages after the first have the kind before them.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    averages: dict[str, torch.Tensor] = field(default_factory=dict)


def small(*overrides: str) -> Config:
    """The small test model's config with overrides."""
    return resolve(overrides=(*SMALL, *overrides))


def train(overrides: tuple[str, ...], folder: str, steps: int = 5, prepare=None) -> Trajectory | None:
    """Trains `steps` steps from scratch; rank 0 returns the trajectory. Collective.

    Args:
        overrides: of the small config.
        folder: an empty folder that all ranks see.
        prepare: importable, called with the built model before the engine takes it (to skew its routing, say).
    """
    config = small(*overrides)
    p = config.parallel
    mesh = make_mesh(p.tp, p.ep, p.expert_tp, 60, p.shard_ranks)
    model = build(config, mesh, placements=config.placements_in_file())
    # A zero output layer would hide most of the model: give what starts at zero small logical values.
    stir(model, mesh)
    if prepare:
        prepare(model, mesh)
    engine = Engine(model, config, mesh)
    ema = EMA(engine, config.train.ema_decays, config.train.ema_warmup)
    objective = make_objective(config)
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    dataset = Synthetic(shape, config.model.num_classes, config.data.size, seed=1)
    loader = SampleStream(
        dataset,
        config.data.seed,
        config.data.condition_dropout,
        config.data.flip,
        config.model.null_class,
        teacher=open_teacher_features(config, dataset),
    )
    out = Trajectory()
    for step in range(steps):
        total = torch.zeros(())
        ranges = loader.micro_batches(
            step, mesh.dp.size, mesh.dp.rank, config.train.accumulation, config.train.global_batch
        )
        for number, positions in enumerate(ranges):
            batch = loader.batch(positions.start, len(positions))
            x, t = objective.corrupt(batch.clean_BCHW, batch.noise_BCHW, batch.u_B)

            def loss(prediction, auxiliary, batch=batch):
                mse = objective.loss(prediction, batch.clean_BCHW, batch.noise_BCHW, batch.u_B)
                auxiliary = auxiliary.aligned(batch.teacher_BWHW, config.model.align_weight)
                total_loss = mse + auxiliary.total()
                return total_loss, total_loss.detach()

            total += engine.micro_step(x, t, condition_of(config, batch), batch.num_conditional, loss=loss)
            if number < len(ranges) - 1:
                engine.finish_micro_step()
        dist.all_reduce(total, group=mesh.dp.process_group)
        out.losses.append(float(total) / mesh.dp.size / config.train.accumulation)
        if step == 0:
            staging, place = Path(folder) / "gradient.writing", Path(folder) / "gradient"
            staging.mkdir(exist_ok=True)
            dist.barrier()
            items = [("gradient", piece, g) for piece, g in engine.reduced_gradients()]
            snap = copy_to_host(engine, items, {})
            assert not write_rank(staging, dist.get_rank(), snap.tensors, snap.parts, 0)
            if dist.get_rank() == 0:
                shapes = {name: list(layout.shape) for name, layout in engine.layouts.items()}
                commit(staging, place, dist.get_world_size(), {"step": 0, "updates": 0, "shapes": shapes}, 60)
        result = engine.step(config.train.lr, total)
        ema.update(result)
        out.norms.append(result.norm)
    manager = CheckpointManager(Path(folder), engine, ema, commit_timeout=60)
    manager.save({"step": steps, "updates": steps})
    manager.finish(last=True)
    if dist.get_rank() == 0:
        gradient, state = Checkpoint(place), Checkpoint(folder_of(Path(folder), steps))
        out.gradients = {name: gradient.logical("gradient", name) for name in gradient.shapes}
        out.parameters = {name: state.logical("master", name) for name in state.shapes}
        for kind in average_kinds(config.train.ema_decays):
            prefix = "" if kind == AVERAGE else f"{kind} "
            out.averages |= {prefix + name: state.logical(kind, name) for name in state.shapes}
    dist.barrier()
    engine.close()
    return out if dist.get_rank() == 0 else None


def train_uncompiled(overrides: tuple[str, ...], folder: str, steps: int = 5) -> Trajectory | None:
    """As `train`, without torch.compile, which takes a minute of a core for the fused update."""
    with torch.compiler.set_stance("force_eager"):
        return train(overrides, folder, steps)


def train_compiled_on_rank_0(overrides: tuple[str, ...], folder: str, steps: int = 5) -> Trajectory | None:
    """As `train`, but only one rank compiles."""
    return (train_uncompiled if dist.get_rank() else train)(overrides, folder, steps)


def condition_of(config: Config, batch: Batch) -> torch.Tensor | TextCondition:
    """The labels of a batch; for a text model texts that depend on the stream position alone, of all lengths from 0.

    Those of null images are as long as others: the model must not see them.
    """
    if not config.model.has_text:
        return batch.labels_B
    tokens, width = config.model.text_tokens, config.model.text_width
    texts = [np.random.default_rng(p).standard_normal((tokens, width)) for p in batch.positions_B.tolist()]
    lengths_B = batch.positions_B % (tokens + 1)
    mask_BN = torch.arange(tokens) < lengths_B.unsqueeze(1)
    return TextCondition(torch.from_numpy(np.stack(texts)).float(), mask_BN)


@torch.no_grad()
def stir(model, mesh) -> None:
    """Gives parameters that start at zero, and tables, logical values that depend on their name alone.

    So large that every part of the model, experts above all, has a good share of the gradient: a limit relative to the
    whole then says something about each part.
    """
    for name, parameter in model.named_parameters():
        layout = model.layouts[name]
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer.linear") or "table" in name:
            seed = int.from_bytes(name.encode(), "little") % (2**31)
            scale = 1.0 if name.endswith("adaLN_modulation.1.bias") else 0.2
            value = np.random.default_rng(seed).standard_normal(layout.shape) * scale
            parameter.add_(layout.local_shard(torch.from_numpy(value).float(), mesh))


def deviation(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest ‖a-b‖ / (1e-5·‖b‖ + 1e-6·‖all of b‖) over tensors, and whose: 1.0 is the limit."""
    norm_of_all = torch.stack([b.double().norm() for b in theirs.values()]).norm()
    worst = (0.0, "")
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        off = float((ours[name].double() - b.double()).norm() / (1e-5 * b.double().norm() + 1e-6 * norm_of_all))
        worst = max(worst, (off, name))
    return worst


def deviations(ours: Trajectory, theirs: Trajectory) -> dict[str, tuple[float, str]]:
    """Largest deviation of every kind, in units of the limit, and where."""
    out = {}
    for kind in ("losses", "norms"):
        pairs = zip(getattr(ours, kind), getattr(theirs, kind), strict=True)
        out[kind] = max((abs(a - b) / (1e-5 * abs(b)), f"step {i}") for i, (a, b) in enumerate(pairs))
    for kind in ("gradients", "parameters", "averages"):
        out[kind] = deviation(getattr(ours, kind), getattr(theirs, kind))
    return out
