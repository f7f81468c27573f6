"""Drawing images: numbered images from a model, and the picture that shows them.

Image number i is fixed by (sample.seed, i, label). Images are drawn in chunks of `sample.batch`, which are the same
however many ranks share them out, so the images do not depend on the number of ranks.
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
from megapromoe.errors import UserError

PICTURE_SIDE = 64  # pixels of an image in a picture: smaller ones are enlarged by a whole factor


class SampleError(UserError):
    """Images that cannot be drawn as asked; found before anything is written, and on all ranks alike."""

    on_all_ranks = True  # every rank raises it, so one rank need print it


def chunks(count: int, batch: int, rank: int, world: int) -> list[range]:
    """Stretches of 0..count-1 that a rank draws: every `world`-th chunk of `batch`, from the `rank`-th."""
    starts = range(rank * batch, count, world * batch)
    return [range(start, min(start + batch, count)) for start in starts]


@torch.no_grad()
def generate(
    model: nn.Module,
    config: Config,
    labels: Sequence[int],
    indices: Sequence[int],
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """This rank's share of the images: its `chunks`, joined; (N, C, H, W) float32 on the model's device.

    Equal bits for any `world` where the ranks compute alike: on a CPU, with the same number of threads.

    Args:
        model: whole, or sharded if the ranks of its groups call this together with the same arguments.
        config: of the run; `sample`, and of `diffusion` the shift, say how to draw.
        labels: class of each image; model.null_class draws without a class.
        indices: number of each image, which fixes its noise.
        rank, world: place among the ranks that share the images out.
        progress: called after each step of the sampler with (steps done, steps of all chunks).
    """
    s, m = config.sample, config.model
    shape = (m.in_channels, m.input_size, m.input_size)
    device = model.get_buffer("pos_embed").device
    mine = chunks(len(labels), s.batch, rank, world)
    training = model.training
    model.eval()
    parts = [torch.empty(0, *shape, device=device)]
    for number, stretch in enumerate(mine):
        labels_B = torch.tensor(labels[stretch.start : stretch.stop], device=device)
        noise = partial(_noise, s.seed, indices[stretch.start : stretch.stop], shape, device)
        predict = guided(model, labels_B, m.null_class, s.guidance, s.guidance_low, s.guidance_high)
        said = progress and partial(_report, progress, number * s.steps, len(mine) * s.steps)
        parts.append(sample(predict, noise(0), s.method, s.steps, config.diffusion.shift, noise, said))
    model.train(training)
    return torch.cat(parts)


def _noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device, draw: int) -> Tensor:
    return image_noise(seed, indices, shape, draw).to(device)


def _report(progress: Callable[[int, int], None], before: int, total: int, step: int) -> None:
    progress(before + step, total)


def grid(images_BCHW: Tensor | np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """A picture of images in rows of `columns`: uint8 (height, width, 3), dark lines between.

    Args:
        images_BCHW: in [-1, 1] (others are clipped), of 1 or 3 channels.
        scale: each pixel becomes scale x scale.

    Raises SampleError for any other number of channels.
    """
    images = np.asarray(images_BCHW, dtype=np.float32)
    B, C, H, W = images.shape
    check_channels(C)
    pixels = ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
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
    """Writes a uint8 (height, width, 3) picture as PNG, whatever the name's ending."""
    imsave(path, picture, format="png")
