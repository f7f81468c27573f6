"""What a run writes: its checkpoints, its snapshots of averages and its pictures, and the disk space that they need.

Bytes are those of the tensors, exact; a file is larger by its header, a few hundred bytes a tensor, and a checkpoint by
its manifest. Saves by the clock need the time of a step, an estimate, so their number is one too. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megapromoe.checkpoint.retention import removable
from megapromoe.checkpoint.step_folders import StepFolder
from megapromoe.config.options import Config, Layout
from megapromoe.planning.cost import tensors_on_rank

STATES = 4 * 4  # bytes of a parameter in a checkpoint: fp32 master, two moments, average
AVERAGE = 4  # and in a snapshot
PICTURE_SIDE = 64  # pixels to which small images are enlarged, as in `diffusion/image_grid.py`
SIMULATED = 2000


@dataclass(frozen=True)
class Disk:
    """Files of a whole run.

    Attributes:
        checkpoint, snapshot, picture: bytes of one; of a picture at most.
        checkpoints, snapshots, pictures: how many are written.
        most_checkpoints: at once, with the one that is being written.
        exact: False where saves by the clock are counted by an estimated time.
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
        """Bytes needed at once."""
        kept = self.snapshots * self.snapshot + self.pictures * self.picture
        return self.most_checkpoints * self.checkpoint + kept

    @property
    def written(self) -> int:
        """Bytes of checkpoints and snapshots written in all."""
        return self.checkpoints * self.checkpoint + self.snapshots * self.snapshot


def disk(config: Config, step_seconds: float | None = None) -> Disk:
    """Counts a run from its first step to `train.steps`. Without a time of a step, saves by the clock are left out."""
    t = config.train
    between, by_clock = _steps_between(config, step_seconds)
    saves = math.ceil(t.steps / between)
    return Disk(
        checkpoint=elements(config) * STATES + buffer_bytes(config),
        snapshot=elements(config) * AVERAGE + buffer_bytes(config),
        checkpoints=saves,
        snapshots=t.steps // t.snapshot_every if t.snapshot_every else 0,
        pictures=t.steps // t.sample_every if t.sample_every else 0,
        picture=picture_bytes(config),
        most_checkpoints=most_at_once(t.steps, between, t.keep, t.keep_every, t.max_bad_steps),
        exact=not by_clock,
    )


def checkpoint_bytes(config: Config) -> int:
    """Bytes that the checkpoints and snapshots of a run need at once, with the one that is being written."""
    return disk(config).peak


def saved_bytes(run: Path) -> int:
    """Bytes of the checkpoints and snapshots that a run has already."""
    patterns = ("checkpoints/step-*/*.safetensors", "snapshots/average-*/*.safetensors")
    return sum(file.stat().st_size for pattern in patterns for file in run.glob(pattern))


def picture_bytes(config: Config) -> int:
    """Bytes of the pixels of a picture that is drawn while training; its PNG file is smaller.

    Four images of each of the first ten classes, in eight columns, see `training/loop.py` and `image_grid.grid`.
    """
    side, count = config.model.input_size, 4 * min(config.model.num_classes, 10)
    scale = max(1, PICTURE_SIDE // side)
    gap, cell = max(1, scale // 4), side * scale
    return (math.ceil(count / 8) * (cell + gap) + gap) * (8 * (cell + gap) + gap) * 3


def _steps_between(config: Config, step_seconds: float | None) -> tuple[int, bool]:
    """Steps between checkpoints, at most `train.steps`, and whether the clock decides them.

    Each save sets the clock back, so the shorter of both intervals decides; a save by steps that falls between two by
    the clock is one more, which the next by the clock follows later.
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
    """Elements of the parameters that a checkpoint holds, over all ranks.

    Experts that do not divide over ep have spare slots, which are saved too.
    """
    ep = config.parallel.ep
    whole = Layout(world=ep, tp=1, ep=ep, dp=ep, edp=1, etp=1, micro_batch=1)
    replicated, routed = tensors_on_rank(config.model, whole)
    return sum(replicated) + ep * sum(routed)


def buffer_bytes(config: Config) -> int:
    """Bytes of the model's persistent buffers: DiffMoE's thresholds, the centroids of k-means and their shares."""
    model = config.model
    of_layer = {"diffmoe": model.num_experts, "kmeans": model.num_experts * (model.hidden_size + 1)}
    return 4 * of_layer.get(model.router, 0) * len(model.moe_blocks)


def most_at_once(steps: int, between: int, keep: int, keep_every: int, max_bad_steps: int) -> int:
    """Checkpoints on disk at once in a run whose every step is applied, with the one that is being written.

    Save by save, as retention removes them. A long run repeats itself: after `SIMULATED` saves, only those that stay
    for good are counted.
    """
    folders: list[StepFolder] = []
    most = 0
    saves = [*range(between, steps, between), steps]
    for step in saves[:SIMULATED]:
        folders.append(StepFolder(Path(), step, step))
        most = max(most, len(folders))
        gone = set(removable(folders, step, keep, keep_every, max_bad_steps))
        folders = [one for one in folders if one not in gone]
    return most + sum(keep_every > 0 and step % keep_every == 0 for step in saves[SIMULATED:])
