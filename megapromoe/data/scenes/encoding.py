"""Scenes as a source of the encoding job: their pixels are stored as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megapromoe.data.autoencoder import Pixels
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.images import Item, Scan
from megapromoe.data.scenes.combinations import CANVAS
from megapromoe.data.scenes.scenes import Scenes


class EncodedScenes:
    """The first scenes of a split; see `encode.Source`.

    Args:
        size: number of scenes.
        seed, split: see `Scenes`.
    """

    def __init__(self, size: int, seed: int = 0, split: str = "train"):
        data, pixels = Scenes(size, seed, split), Pixels(3)
        scenes = [data.scene_at(index) for index in range(size)]
        self._pixels = np.stack([s.pixels for s in scenes]).transpose(0, 3, 1, 2)
        self.items = tuple(CaptionedItem(f"{split}/{seed}/{index}", 0, s.caption) for index, s in enumerate(scenes))
        self.scan = Scan(self.items, Scenes.class_names, ())
        self.manifest_fields = {
            "shape": Scenes.shape,
            "dtype": "uint8",
            "mirror": "none",  # a mirrored scene shows other relations
            "stochastic": False,
            "scale": pixels.scale,
            "shift": pixels.shift,
            "autoencoder": pixels.identity,
            "resolution": CANVAS,
            "crop": "none",
        }

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `encode.Source.records`."""
        for item in items:
            index = int(item.path.rpartition("/")[2])
            yield item, self._pixels[index][None, None].astype(np.float32), ""
