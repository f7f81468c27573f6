"""Numbered images from a model, and the grid that shows them.

Image i is fixed by (sample.seed, i, label), and, where the model's output depends on its batch as DiffMoE's does, by
the other images of its chunk. Chunks of `sample.batch` images are the same at any number of ranks, so that the images
do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave
from torch import Tensor, nn

from megapromoe.config.options import Config
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.samplers import guided, sample
from megapromoe.distributed import watchdog
from megapromoe.errors import UserError
from megapromoe.io import atomic_path

PICTURE_SIDE = 64  # pixels of an image in a grid: smaller ones are enlarged by a whole factor


class SampleError(UserError):
    """Images that cannot be generated as requested; every rank raises it."""

    on_all_ranks = True


def chunk_ranges(count: int, batch: int) -> list[range]:
    """The numbers of the images of each chunk: `batch` of 0..count-1 each, the last one perhaps fewer."""
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


@torch.no_grad()
def generate(
    model: nn.Module,
    config: Config,
    labels: Sequence[int],
    indices: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images (N, C, H, W) float32 on the model's device, generated in chunks of `sample.batch`.

    Equal bits on every rank that computes alike: on a CPU, with the same number of threads.

    Args:
        model: whole, or sharded if the ranks of its tensor-parallel group call this with the same arguments, and those
            of its expert-parallel group at the same time.
        config: of the run; `sample`, and of `diffusion` the shift, define the sampler.
        labels: class of each image; model.null_class generates without a class.
        indices: number of each image, which fixes its noise.
        progress: called after each step of the sampler with (steps done, steps of all chunks).
    """
    s, m = config.sample, config.model
    shape = (m.in_channels, m.input_size, m.input_size)
    device = model.get_buffer("pos_embed").device
    ranges = chunk_ranges(len(labels), s.batch)
    training = model.training
    model.eval()
    parts = [torch.empty(0, *shape, device=device)]
    for number, chunk in enumerate(ranges):
        labels_B = torch.tensor(labels[chunk.start : chunk.stop], device=device)
        noise = partial(_noise, s.seed, indices[chunk.start : chunk.stop], shape, device)
        apart = m.images_depend_on_batch
        predict = guided(model, labels_B, m.null_class, s.guidance, s.guidance_low, s.guidance_high, two_calls=apart)
        report = partial(_report, progress, number * s.steps, len(ranges) * s.steps)
        parts.append(sample(predict, noise(0), s.method, s.steps, config.diffusion.shift, noise, report))
    model.train(training)
    return torch.cat(parts)


def _noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device, draw: int) -> Tensor:
    return image_noise(seed, indices, shape, draw).to(device)


def _report(progress: Callable[[int, int], None] | None, before: int, total: int, step: int) -> None:
    watchdog.touch()
    if progress is not None:
        progress(before + step, total)


def to_bytes(images_BCHW: Tensor | np.ndarray) -> np.ndarray:
    """Images in [-1, 1] (others are clipped) as uint8 (B, H, W, C)."""
    images = torch.as_tensor(images_BCHW).float().clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images_BCHW: Tensor | np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """A picture of images in rows of `columns`: uint8 (height, width, 3), dark lines between.

    Args:
        images_BCHW: in [-1, 1] (others are clipped), of 1 or 3 channels.
        scale: each pixel becomes scale x scale.

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
    """Raises SampleError unless images of so many channels can be shown."""
    if channels not in (1, 3):
        raise SampleError(
            f"model.in_channels = {channels}: a picture shows 1 or 3 channels, and latents need their"
            " autoencoder, which the run does not hold; write them with --out FILE.npz"
        )


def picture_scale(side: int) -> int:
    """How much to enlarge images of so many pixels so that one sees them."""
    return max(1, PICTURE_SIDE // side)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a uint8 (height, width, 3) picture as a PNG file, as a whole. Raises OSError."""
    with atomic_path(path) as staging:
        imsave(staging, picture, format="png")
