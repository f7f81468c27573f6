"""Writes images of GenEval's prompts in the folder layout that its evaluation reads.

    OUT/00000/metadata.jsonl       the prompt's line of GenEval's file
    OUT/00000/samples/0000.png ...
    OUT/00000/grid.png             all of them

Source: Ghosh et al. 2023, github.com/djghosh13/geneval.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megapromoe import io
from megapromoe.diffusion.image_grid import write_png
from megapromoe.distributed import watchdog
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSet


class GenEvalWriter(ImageSetWriter):
    """An `ImageSetWriter` of a folder in GenEval's layout; its prompts have `metadata`."""

    def _pictures(self, chunk: int) -> list[Path]:
        assert self.prompts is not None
        each = self.count // len(self.prompts)
        return [self._folder(i // each) / "samples" / f"{i % each:04d}.png" for i in self.ranges[chunk]]

    def _describe(self, labels: np.ndarray) -> None:
        assert self.prompts is not None
        for number, prompt in enumerate(self.prompts):
            folder = self._folder(number)
            io.write_text(folder / "metadata.jsonl", f"{prompt.metadata}\n")
            images = ImageSet(folder / "samples")
            write_png(folder / "grid.png", _grid(images.read(0, len(images))))
            watchdog.touch()

    def _folder(self, prompt: int) -> Path:
        return self.folder / f"{prompt:05d}"


def _grid(images_BHWC: np.ndarray) -> np.ndarray:
    """Images in a square, row by row: uint8 (height, width, 3)."""
    B, H, W, _ = images_BHWC.shape
    columns = math.ceil(math.sqrt(B))
    picture = np.zeros((-(-B // columns) * H, columns * W, 3), dtype=np.uint8)
    for i, image in enumerate(images_BHWC):
        top, left = i // columns * H, i % columns * W
        picture[top : top + H, left : left + W] = image
    return picture
