"""Generates numbered images from a model, and arranges images in a grid.

Image i is determined by (its seed, i, its class or text) and, if the output of the model depends on its batch as that
of DiffMoE, by the other images of its chunk. Chunks of `sample.batch` images are the same at any number of ranks, so
images do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megapromoe.config.options import Config
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.samplers import Condition, Labels, guided, sample
from megapromoe.distributed import watchdog
from megapromoe.errors import UserError
from megapromoe.imports import uncollected
from megapromoe.io import atomic_path

PICTURE_SIDE = 64  # pixels; smaller images of a grid are enlarged by an integer factor to about this side


class SampleError(UserError):
    """The requested images cannot be generated; every rank raises it."""

    on_all_ranks = True


def chunk_ranges(count: int, batch: int) -> list[range]:
    """The image numbers of each chunk: 0..count-1 in chunks of `batch`, of which the last may be smaller."""
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


@torch.no_grad()
def generate(
    model: nn.Module,
    config: Config,
    condition: Sequence[int] | Condition,
    indices: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Generates images (N, C, H, W), float32 on the device of the model, in chunks of `sample.batch`.

    The result is the same to the bit on all ranks with the same hardware and number of threads.

    Args:
        model: unsharded; or sharded, if the ranks of its tensor-parallel group call this with the same arguments, and
            those of its expert-parallel group call it at the same time.
        config: of the run; `sample` and `time_shift` define the sampler.
        condition: class of each image, where model.null_class generates an image without a class; or texts, in which
            one without tokens generates an image without a text.
        indices: number of each image, which determines its noise, together with its seed.
        progress: called after each step of the sampler with (finished steps, steps of all chunks).
        seeds: seed of each image; None: `sample.seed`.
    """
    s, m = config.sample, config.model
    shape = (m.in_channels, m.input_size, m.input_size)
    device = next(chain(model.buffers(), model.parameters())).device
    if isinstance(condition, Sequence):
        condition = Labels(torch.tensor(condition, dtype=torch.int64), m.null_class)
    condition = condition.to(device)
    seeds = [s.seed] * len(indices) if seeds is None else seeds
    ranges = chunk_ranges(len(indices), s.batch)
    training = model.training
    model.eval()
    parts = [torch.empty(0, *shape, device=device)]
    for number, chunk in enumerate(ranges):
        start, stop = chunk.start, chunk.stop
        noise = partial(_noise, seeds[start:stop], indices[start:stop], shape, device)
        two_calls = m.images_depend_on_batch
        interval = s.guidance_low, s.guidance_high
        predict = guided(model, condition.part(start, stop), s.guidance, *interval, two_calls=two_calls)
        report = partial(_report, progress, number * s.steps, len(ranges) * s.steps)
        shift, objective = config.time_shift, config.diffusion.objective
        parts.append(sample(predict, noise(0), s.method, s.steps, shift, noise, report, objective))
    model.train(training)
    return torch.cat(parts)


def _noise(
    seeds: Sequence[int], indices: Sequence[int], shape: tuple[int, ...], device: torch.device, draw: int
) -> Tensor:
    noise = torch.empty(len(indices), *shape)
    for seed in dict.fromkeys(seeds):
        rows = [row for row, other in enumerate(seeds) if other == seed]
        noise[rows] = image_noise(seed, [indices[row] for row in rows], shape, draw)
    return noise.to(device)


def _report(progress: Callable[[int, int], None] | None, before: int, total: int, step: int) -> None:
    watchdog.touch()
    if progress is not None:
        progress(before + step, total)


def to_bytes(images_BCHW: Tensor | np.ndarray) -> np.ndarray:
    """Converts images (B, C, H, W) in [-1, 1], clipped, to uint8 (B, H, W, C)."""
    images = torch.as_tensor(images_BCHW).float().clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images_BCHW: Tensor | np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Arranges images in rows of `columns`, with dark lines between: uint8 (height, width, 3).

    Args:
        images_BCHW: in [-1, 1], clipped, with 1 or 3 channels.
        columns: images in a row.
        scale: each pixel becomes scale x scale pixels.

    Raises SampleError for any other number of channels.
    """
    B, C, H, W = images_BCHW.shape
    check_channels(C)
    pixels = to_bytes(images_BCHW).repeat(scale, axis=1).repeat(scale, axis=2)
    gap, h, w = max(1, scale // 4), H * scale, W * scale
    rows = math.ceil(B / columns)
    picture = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 40, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        picture[top : top + h, left : left + w] = image
    return picture


def check_channels(channels: int) -> None:
    """Raises SampleError unless images with so many channels can be shown."""
    if channels not in (1, 3):
        raise SampleError(
            f"model.in_channels = {channels}: a picture has 1 or 3 channels, and latents must be decoded by their"
            " autoencoder, which is not part of the run; write them with --out FILE.npz"
        )


def picture_scale(side: int) -> int:
    """The factor by which images of `side` pixels are enlarged in a grid."""
    return max(1, PICTURE_SIDE // side)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 (height, width, 3), as a PNG file; atomically. Raises OSError."""
    with uncollected(exempt=False):  # slow, and only one rank writes pictures
        from matplotlib.image import imsave

    with atomic_path(path) as staging:
        imsave(staging, picture, format="png")
