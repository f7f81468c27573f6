"""A few images in one file: a grid to look at, or the arrays to work with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapromoe import io
from megapromoe.diffusion.image_grid import grid, picture_scale, write_png
from megapromoe.distributed.agreement import gather_to_rank0
from megapromoe.sampling.image_sets import ImageSetError


class PreviewWriter:
    """Writes `out`, a .png or an .npz (`images`, float, `labels`, `seed`); see `generation.ImageWriter`.

    Ranks keep their chunks in memory: rank 0 alone needs access to `out`, nothing is left beside it, and a repeated
    command replaces it.
    """

    def __init__(self, out: Path, count: int, batch: int, columns: int, seed: int):
        """Args:
        count: images in all.
        batch: images of a chunk; the last one may have fewer.
        columns: images in a row of the grid.
        seed: of the images.
        """
        self.out, self.columns, self.seed = Path(out), columns, seed
        self.num_chunks = -(-count // batch)
        self._chunks: dict[int, Tensor] = {}

    def open(self, identity: Mapping[str, Any]) -> list[int]:
        """All chunks. Makes the folder of `out`. Raises ImageSetError if `out` cannot be written."""
        if self.out.is_dir():
            raise ImageSetError(f"out = {self.out}: is a folder; give the path of a file")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            staging = io.staging_path(self.out)
            staging.unlink(missing_ok=True)  # perhaps a link, which would be followed
            staging.touch(exist_ok=False)
            staging.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        return list(range(self.num_chunks))

    def write(self, chunk: int, images_BCHW: Tensor) -> None:
        """Keeps the images of a chunk until `finish`."""
        self._chunks[chunk] = images_BCHW.cpu()

    def finish(self, labels: np.ndarray) -> None:
        """Gathers all chunks on rank 0, which writes `out` as a whole. Collective. Raises ImageSetError on rank 0."""
        gathered = gather_to_rank0(self._chunks)
        if gathered is None:
            return
        chunks = {number: images for part in gathered for number, images in part.items()}
        images = torch.cat([chunks[number] for number in range(self.num_chunks)])
        try:
            if self.out.suffix == ".npz":
                with io.atomic_write(self.out) as file:
                    np.savez(file, images=images.numpy(), labels=labels, seed=np.array(self.seed))
            else:
                write_png(self.out, grid(images, self.columns, picture_scale(images.shape[-1])))
        except OSError as error:
            raise self._unwritable(error) from error

    def abandon(self) -> bool:
        """True: `open` leaves nothing."""
        return True

    def close(self) -> None:
        """Frees the images."""
        self._chunks.clear()

    def _unwritable(self, error: OSError) -> ImageSetError:
        return ImageSetError(f"out = {self.out}: cannot be written ({error.strerror}); give another path")
