"""The training run, top to bottom.

Repeating the command resumes: the newest checkpoint is loaded and the stream of samples goes on where it was, since the
state of the data is the number of steps done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe import cost
from megapromoe.config import Config, TrainConfig, to_dict
from megapromoe.data.builtin import open_dataset
from megapromoe.data.loader import Batch, Loader, prefetch
from megapromoe.diffusion.drawing import generate, grid, picture_scale, write_png
from megapromoe.diffusion.objectives import make_objective
from megapromoe.parallel.mesh import Mesh, make_mesh
from megapromoe.parallelize import build
from megapromoe.training import runtime
from megapromoe.training.checkpoint import load, save
from megapromoe.training.checkpoint_file import Checkpoint, folder_of, steps_in
from megapromoe.training.ema import EMA
from megapromoe.training.engine import Engine
from megapromoe.training.metrics import Metrics, expert_statistics, memory, peak_flops, throughput
from megapromoe.training.run_directory import RunDirectory, RunDirectoryError

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run that cannot go on."""

    everywhere = True


def train(config: Config, folder: Path, launch: runtime.Launch) -> None:
    """Trains to `train.steps` in the run directory `folder`, from its newest checkpoint if it has any. Collective.

    Raises RunDirectoryError, CheckpointError, DatasetError or TrainingError on every rank, each saying what to do.
    """
    device = runtime.start(launch, config.train.timeout)
    try:
        own = _open_run(config, folder, launch)
        try:
            _train(config, RunDirectory(folder), device)
        finally:
            if own:
                own.close()
    finally:
        runtime.stop()


def _open_run(config: Config, folder: Path, launch: runtime.Launch) -> RunDirectory | None:
    """Rank 0 takes the folder; where it may not, every rank raises what it found."""
    own, said = None, [""]
    if launch.rank == 0:
        try:
            own = RunDirectory.open(folder, config, launch.world, launcher=launch.launcher)
        except Exception as error:
            dist.broadcast_object_list([str(error)], src=0)
            raise
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise RunDirectoryError(said[0])
    return own


def _train(config: Config, run: RunDirectory, device: torch.device) -> None:
    t = config.train
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, config.parallel.expert_tp, t.timeout)
    dataset = open_dataset(config)
    loader = Loader(dataset, config.data.seed, config.data.label_drop, config.data.flip, config.model.null_class)
    engine = Engine(build(config, mesh, device), config, mesh)
    ema = EMA(engine, t.ema)
    objective = make_objective(config)

    step, updates = 0, 0  # an optimizer step whose gradient is not finite is a step, but no update
    if steps := steps_in(run.checkpoints):
        checkpoint = Checkpoint(folder_of(run.checkpoints, steps[-1]))
        step = load(checkpoint, engine, ema)
        updates = checkpoint.manifest["updates"]
        logger.info("continuing from %s", checkpoint.folder)
    if step >= t.steps:
        logger.info("%s: all %d steps are done; train.steps=N with a larger N trains on", run.folder, step)
        return

    stretches = (
        stretch
        for s in range(step, t.steps)
        for stretch in loader.micro_batches(s, mesh.dp.size, mesh.dp.rank, t.accumulation, t.global_batch)
    )
    batches = prefetch(loader, stretches)
    metrics = Metrics(run.folder, config, t.steps, step, enabled=mesh.rank == 0)
    window = _Window(config, mesh, device)
    bad_in_a_row = 0
    try:
        while step < t.steps:
            loss = torch.zeros((), device=device)
            for micro in range(t.accumulation):
                batch = next(batches).to(device)
                loss += _micro_step(engine, objective, batch, window)
                if micro < t.accumulation - 1:
                    engine.finish_micro_step()
            rate = learning_rate(t, step)
            result = engine.step(rate, loss)
            step += 1
            if result.applied:
                ema.update()
                updates, bad_in_a_row = updates + 1, 0
            else:
                bad_in_a_row += 1
                first = (step - 1) * t.global_batch
                logger.warning(
                    "step %d: loss or gradient is not finite, no rank updated; samples %d..%d of the stream",
                    *(step, first, first + t.global_batch - 1),
                )
                if bad_in_a_row >= t.max_bad_steps:
                    raise TrainingError(
                        f"step {step}: {bad_in_a_row} steps in a row without a finite gradient"
                        f" (train.max_bad_steps = {t.max_bad_steps}); lower train.lr or train.clip, and start again"
                        " from the newest checkpoint by repeating the command"
                    )
            if step % t.log_every == 0 or step == t.steps:
                values, layers = window.close(result.norm, rate)
                metrics.log(step, values, layers)
            if t.sample_every and step % t.sample_every == 0:
                with window.paused():
                    picture = _draw(engine, ema, config)
                    metrics.image(step, "samples", picture)
                    if mesh.rank == 0:
                        write_png(run.samples / f"step-{step:08d}.png", picture)
            if step == t.steps or t.save_every and step % t.save_every == 0:
                facts = {"step": step, "updates": updates, "config": to_dict(config), "versions": _versions()}
                with window.paused():
                    save(run.checkpoints, engine, ema, facts, t.keep)
    finally:
        batches.close()
        metrics.close()
    engine.close()


def _micro_step(engine: Engine, objective, batch: Batch, window: _Window) -> Tensor:
    """Forward and backward of one micro-batch; returns its loss, detached."""
    x_BCHW, t_B = objective.corrupt(batch.clean_BCHW, batch.noise_BCHW, batch.u_B)

    def loss(prediction: Tensor, auxiliary) -> tuple[Tensor, Tensor]:
        denoising = objective.loss(prediction, batch.clean_BCHW, batch.noise_BCHW, batch.u_B)
        total = denoising + auxiliary.total()
        window.add(denoising, total, auxiliary)
        return total, total.detach()

    return engine.micro_step(x_BCHW, t_B, batch.labels_B, batch.conditional, loss=loss)


def learning_rate(t: TrainConfig, step: int) -> float:
    """Of the step after `step` steps: linear warm-up from lr/warmup to lr, then constant or a cosine to min_lr."""
    if step < t.warmup:
        return t.lr * (step + 1) / t.warmup
    if t.schedule == "constant":
        return t.lr
    done = (step - t.warmup) / max(1, t.steps - t.warmup)
    return t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Window:
    """Sums of what happened since the last log line; tensors stay on the device until then."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device):
        self.config, self.mesh, self.device = config, mesh, device
        self.flops = cost.flops_per_image(config.model).training
        self.peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        self._reset()

    def add(self, denoising: Tensor, total: Tensor, auxiliary) -> None:
        """Takes in a micro-batch."""
        self.sums["loss"] += total.detach()
        self.sums["denoising"] += denoising.detach()
        for name, loss_L in auxiliary.losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss_L.detach().sum()
        self.load = self.load + auxiliary.load_LE
        self.gate = self.gate + auxiliary.gate_L
        self.micro += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is not training out of the clock."""
        start = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - start

    def close(self, norm: float, rate: float) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Means over the window and all data ranks, numbers of each layer; then starts a new window. Collective."""
        dp = self.mesh.dp
        packed = torch.stack([torch.as_tensor(v, device=self.device).float() for v in self.sums.values()])
        packed = torch.cat([packed, self.gate.flatten(), self.load.flatten()])
        dist.all_reduce(packed, group=dp.handle)
        sums, gate, load = packed.split([len(self.sums), self.gate.numel(), self.load.numel()])
        means = (sums / (self.micro * dp.size)).tolist()
        values = dict(zip(self.sums, means, strict=True)) | {"gradient_norm": norm, "learning_rate": rate}
        images = self.micro * self.config.train.global_batch // self.config.train.accumulation
        seconds = time.perf_counter() - self.start - self.excluded
        values |= throughput(images, seconds, self.flops, self.mesh.world, self.peak)
        values |= expert_statistics(load.view_as(self.load)) | {"memory_bytes": memory()}
        layers = {}
        if self.load.numel():
            layers = {"expert_load": load.view_as(self.load), "gate": gate / (self.micro * dp.size)}
        self._reset()
        return values, layers

    def _reset(self) -> None:
        moe = len(self.config.model.moe_blocks)
        self.sums: dict = {name: torch.zeros((), device=self.device) for name in ("loss", "denoising")}
        self.load = torch.zeros(moe, self.config.model.num_experts if moe else 0, device=self.device)
        self.gate = torch.zeros(moe, device=self.device)
        self.micro = 0
        self.start = time.perf_counter()
        self.excluded = 0.0


def _draw(engine: Engine, ema: EMA, config: Config):
    """A grid of samples of the averaged weights, drawn by all ranks together with the model as it is laid out."""
    classes = config.model.num_classes
    labels = [c for c in range(min(classes, 10)) for _ in range(4)]
    with ema.in_place():
        images = generate(engine.module, config, labels, list(range(len(labels))))
    shown = images[:, :3] if images.shape[1] == 4 else images  # latents: the first three channels, as colours
    return grid(shown.cpu(), columns=8, scale=picture_scale(config.model.input_size))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("megapromoe", "torch", "deepspeed")}
