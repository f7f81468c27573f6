"""Disk space of a run: its checkpoints, its snapshots of averaged weights and its sample pictures.

Sizes are the exact bytes of the tensors. Files are larger by a header of a few hundred bytes per tensor, checkpoints
also by their manifest. The number of saves by `train.save_minutes` depends on the estimated time of a step, so it is an
estimate too. Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megapromoe.checkpoint.retention import removable
from megapromoe.checkpoint.step_folders import StepFolder
from megapromoe.config.layout import Layout
from megapromoe.config.options import Config
from megapromoe.planning.cost import tensors_on_rank

TRAINING_BYTES = 3 * 4  # per parameter: fp32 master weight and two moments
MUON_BYTES = 2 * 4  # per parameter that Muon updates: fp32 master weight and its momentum
AVERAGE_BYTES = 4  # per parameter and decay: the averaged weight
PICTURE_SIDE = 64  # pixels to which small images are enlarged, as in `diffusion/image_grid.py`
SIMULATED_SAVES = 2000  # the saves for which `most_at_once` simulates the removal of old checkpoints


@dataclass(frozen=True)
class DiskUsage:
    """The files of a complete run.

    Attributes:
        checkpoint, snapshot, picture: bytes of one file or folder; for a picture an upper bound.
        checkpoints, snapshots, pictures: how many are written in total.
        most_checkpoints: largest number of checkpoints on disk at the same time, with the one being written.
        exact: False if the number of saves was computed from an estimated time of a step.
    """

    checkpoint: int
    snapshot: int
    checkpoints: int
    snapshots: int
    pictures: int
    picture: int
    most_checkpoints: int
    exact: bool

    @property
    def peak(self) -> int:
        """Largest number of bytes on disk at the same time."""
        kept = self.snapshots * self.snapshot + self.pictures * self.picture
        return self.most_checkpoints * self.checkpoint + kept

    @property
    def written(self) -> int:
        """Bytes of all checkpoints and snapshots that are written, including those that are removed later."""
        return self.checkpoints * self.checkpoint + self.snapshots * self.snapshot


def disk(config: Config, step_seconds: float | None = None) -> DiskUsage:
    """The disk usage of a run from step 0 to `train.steps`.

    Args:
        step_seconds: estimated seconds of a step; None: saves by `train.save_minutes` are not counted.
    """
    t = config.train
    between, by_clock = _steps_between(config, step_seconds)
    saves = math.ceil(t.steps / between)
    averages = AVERAGE_BYTES * len(t.ema_decays)
    return DiskUsage(
        checkpoint=elements(config) * (TRAINING_BYTES + averages)
        - muon_elements(config) * (TRAINING_BYTES - MUON_BYTES)
        + buffer_bytes(config),
        snapshot=elements(config) * averages + buffer_bytes(config),
        checkpoints=saves,
        snapshots=t.steps // t.snapshot_every if t.snapshot_every else 0,
        pictures=t.steps // t.sample_every if t.sample_every else 0,
        picture=picture_bytes(config),
        most_checkpoints=most_at_once(t.steps, between, t.keep_last, t.keep_every, t.max_bad_steps),
        exact=not by_clock,
    )


def checkpoint_bytes(config: Config) -> int:
    """Peak bytes of the checkpoints, snapshots and pictures of a run, with the checkpoint that is being written."""
    return disk(config).peak


def saved_bytes(run: Path) -> int:
    """Bytes of the checkpoints and snapshots that a run directory contains now."""
    patterns = ("checkpoints/step-*/*.safetensors", "snapshots/average-*/*.safetensors")
    return sum(file.stat().st_size for pattern in patterns for file in run.glob(pattern))


def picture_bytes(config: Config) -> int:
    """Bytes of the pixels of a sample picture that training writes; the PNG file is smaller.

    The picture has four images of each of the first ten classes, in eight columns: see `training/loop.py` and
    `image_grid.grid`.
    """
    side, count = config.model.input_size, 4 * min(config.model.num_classes, 10)
    scale = max(1, PICTURE_SIDE // side)
    gap, cell = max(1, scale // 4), side * scale
    return (math.ceil(count / 8) * (cell + gap) + gap) * (8 * (cell + gap) + gap) * 3


def _steps_between(config: Config, step_seconds: float | None) -> tuple[int, bool]:
    """Steps between checkpoints, at most `train.steps`, and whether `train.save_minutes` determines them.

    Each save restarts the clock, so the shorter interval determines the saves. A save by `train.save_every` between two
    saves by the clock is an additional one and delays the next.
    """
    t = config.train
    by_steps = min(t.save_every or t.steps, t.steps)
    if not t.save_minutes or step_seconds is None:
        return by_steps, False
    by_clock = max(1, math.ceil(60 * t.save_minutes / step_seconds))
    if by_clock >= by_steps:
        return by_steps, False
    return math.ceil(by_steps / math.ceil(by_steps / by_clock)), True


def elements(config: Config) -> int:
    """Number of parameter elements in a checkpoint, over all ranks.

    If not all ranks have equally many experts, the expert tensors are padded, and the padding is saved too.
    """
    return _elements(config, None)


def muon_elements(config: Config) -> int:
    """Those of `elements` that Muon updates; none with another `train.optimizer`."""
    return _elements(config, True) if config.train.optimizer == "muon" else 0


def _elements(config: Config, hidden: bool | None) -> int:
    ep = config.parallel.ep
    slots = tuple(placement.slots for placement in config.placements_in_file().values())
    layout = Layout(world=ep, tp=1, ep=ep, dp=ep, edp=1, etp=1, micro_batch=1, placed_slots=slots)
    replicated, routed = tensors_on_rank(config.model, layout, hidden)
    return sum(replicated) + ep * sum(routed)


def buffer_bytes(config: Config) -> int:
    """Bytes of the model's persistent buffers: thresholds, k-means centroids and shares, balance biases."""
    model = config.model
    per_layer = {"diffmoe": model.num_experts, "race": 1, "kmeans": model.num_experts * (model.hidden_size + 1)}
    biases = model.num_experts if model.balance_bias else 0
    return 4 * (per_layer.get(model.router, 0) + biases) * len(model.moe_blocks)


def most_at_once(steps: int, between: int, keep: int, keep_every: int, max_bad_steps: int) -> int:
    """Largest number of checkpoints on disk at the same time, with the one being written, if every step is applied.

    Simulates the saves and the removals of `retention.py`. After `SIMULATED_SAVES` saves the number of temporary
    checkpoints repeats, so only the additional permanent ones (`keep_every`) are counted from then on.

    Args:
        steps: steps of the run.
        between: steps between two saves.
        keep, keep_every, max_bad_steps: the options of `train`.
    """
    folders: list[StepFolder] = []
    most = 0
    saves = [*range(between, steps, between), steps]
    for step in saves[:SIMULATED_SAVES]:
        folders.append(StepFolder(Path(), step, step))
        most = max(most, len(folders))
        removed = set(removable(folders, step, keep, keep_every, max_bad_steps))
        folders = [folder for folder in folders if folder not in removed]
    return most + sum(keep_every > 0 and step % keep_every == 0 for step in saves[SIMULATED_SAVES:])
