"""Pictures of samples during training: of classes, or of captions that training does not use where there are such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megapromoe.config.options import Config
from megapromoe.data.caption_batches import Captions, CaptionSource
from megapromoe.data.caption_sheet import prompt_sheet
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.diffusion import multistep
from megapromoe.diffusion.image_grid import generate, grid, picture_scale
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.text_condition import TextCondition

CLASSES, CAPTIONS, IMAGES = 10, 8, 4  # at most so many classes or captions, and images of each


@dataclass(frozen=True)
class Preview:
    """What the pictures show.

    Attributes:
        condition: classes, or texts, of the images.
        captions: the texts in words, each of `IMAGES` images; empty for classes.
    """

    condition: list[int] | TextCondition
    captions: Sequence[str] = ()

    def picture(self, engine: Engine, ema: EMA, config: Config) -> np.ndarray:
        """Images generated with the averaged weights: uint8 (height, width, 3). Collective."""
        count = len(self.condition)
        with ema.swapped_in():
            images = generate(engine.module, config, self.condition, list(range(count)))
        channels = images.shape[1]
        if channels not in (1, 3):  # latents: show the first three channels as RGB
            images = images[:, :3] if channels > 3 else images[:, :1]
        if self.captions:
            return prompt_sheet(images.cpu(), self.captions)
        return grid(images.cpu(), columns=8, scale=picture_scale(config.model.input_size))


def open_preview(config: Config, captions: CaptionSource | None) -> Preview | None:
    """What the pictures of a run show; None if it makes none (`train.sample_every`).

    Args:
        captions: those of the training data.

    Raises MethodUnavailable if the sampling method needs a package that is not installed; DatasetError if the captions
    cannot be read.
    """
    if not config.train.sample_every:
        return None
    multistep.check_available(config.sample.method)
    if not isinstance(captions, Captions):
        classes = range(min(config.model.num_classes, CLASSES))
        return Preview([c for c in classes for _ in range(IMAGES)])
    if config.data.test_path:
        held_out = open_captions(config, open_dataset(config, "test"))
        assert isinstance(held_out, Captions)
        captions = held_out
    texts = captions.text
    indices = np.unique(np.linspace(0, len(texts) - 1, CAPTIONS).astype(np.int64))
    batch = captions.batch(indices.repeat(IMAGES), np.zeros(len(indices) * IMAGES, dtype=bool))
    condition = TextCondition(batch.features_BND, batch.mask_BN)
    return Preview(condition, [texts.caption(int(index)) for index in indices])
