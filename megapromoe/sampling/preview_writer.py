"""Writes a few images to one file: a picture with a grid, with captions for prompts, or an .npz with arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapromoe import io
from megapromoe.data.caption_sheet import prompt_sheet
from megapromoe.diffusion.image_grid import grid, picture_scale, write_png
from megapromoe.distributed.agreement import gather_to_rank0
from megapromoe.sampling.image_sets import ImageSetError


class PreviewWriter:
    """Writes `out`, a .png or an .npz (`images`, float, `labels`, `prompts`, `seed`); see `generation.ImageWriter`.

    Of latents that are not decoded, an .npz also has `scale` and `shift`: raw latents are images / scale + shift.

    Ranks keep their chunks in memory, so only rank 0 needs access to `out`, and no other files are written. A repeated
    command replaces `out`.
    """

    def __init__(
        self,
        out: Path,
        count: int,
        batch: int,
        columns: int,
        seed: int,
        prompts: Sequence[str] | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    ):
        """Args:
        out: path of the file, .png or .npz.
        count: total number of images.
        batch: images per chunk; the last chunk may have fewer.
        columns: images in a row of the grid.
        seed: seed of the images, stored in an .npz.
        prompts: texts, which have equally many images each; None: classes.
        normalisation: scale and shift of each channel of latents that are not decoded.
        """
        self._normalisation = normalisation
        self.out, self.columns, self.seed, self.prompts = Path(out), columns, seed, prompts
        self.num_chunks = -(-count // batch)
        self._chunks: dict[int, Tensor] = {}

    def open(self, identity: Mapping[str, Any]) -> list[int]:
        """Returns all chunks, and creates the folder of `out`. Raises ImageSetError if `out` cannot be written."""
        if self.out.is_dir():
            raise ImageSetError(f"out = {self.out}: is a folder; give the path of a file")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            staging = io.staging_path(self.out)
            staging.unlink(missing_ok=True)  # it may be a link, which `touch` would follow
            staging.touch(exist_ok=False)
            staging.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        return list(range(self.num_chunks))

    def write(self, chunk: int, images_BCHW: Tensor) -> None:
        """Keeps the images (B, C, H, W) of a chunk in memory until `finish`."""
        self._chunks[chunk] = images_BCHW.cpu()

    def finish(self, labels: np.ndarray) -> None:
        """Gathers all chunks on rank 0, which writes `out` atomically. Collective. Raises ImageSetError on rank 0."""
        gathered = gather_to_rank0(self._chunks)
        if gathered is None:
            return
        chunks = {number: images for part in gathered for number, images in part.items()}
        images = torch.cat([chunks[number] for number in range(self.num_chunks)])
        try:
            if self.out.suffix == ".npz":
                arrays: dict[str, Any] = {"images": images.numpy(), "labels": labels, "seed": np.array(self.seed)}
                if self.prompts is not None:
                    arrays["prompts"] = np.array(self.prompts)
                if self._normalisation is not None:
                    scale, shift = (np.array(v, np.float32)[:, None, None] for v in self._normalisation)
                    arrays |= {"scale": scale, "shift": shift}
                with io.atomic_write(self.out) as file:
                    np.savez(file, **arrays)
            elif self.prompts is None:
                write_png(self.out, grid(images, self.columns, picture_scale(images.shape[-1])))
            else:
                write_png(self.out, prompt_sheet(images, self.prompts))
        except OSError as error:
            raise self._unwritable(error) from error

    def abandon(self) -> bool:
        """Returns True, since `open` leaves no files."""
        return True

    def close(self) -> None:
        """Frees the images."""
        self._chunks.clear()

    def _unwritable(self, error: OSError) -> ImageSetError:
        return ImageSetError(f"out = {self.out}: cannot be written ({error.strerror}); give another path")
