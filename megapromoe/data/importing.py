"""Published latents, one .npz for each image (`latent`, `latent_flip`), as a source of the encoding job.

Source: the files that ProMoE's release makes of ImageNet: folder/CLASS/NAME.latent.npz, float32 (8, 32, 32): the
parameters of the SD-VAE's posterior, mean above log-variance, unscaled.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.data.images import ImageError, Item, Scan, scan

SUFFIXES = frozenset((".npz",))
_LARGEST_ARRAY = 1 << 28  # bytes; a published latent has 16 KiB
LOGVAR = (-30.0, 20.0)  # diffusers cuts off a posterior's log-variance here when it draws; the files hold it uncut
VALUES = ("posterior", "latent")


class PublishedLatents:
    """A folder of such files.

    Args:
        values: "posterior", mean and log-variance one above the other; or "latent", a value.
        scale, shift: of latents, `(raw - shift) * scale`, for all channels.
        name: of the autoencoder that made them, as `autoencoder.open_autoencoder` takes it; `sha256` of its weights,
            "" where they are not at hand.
        factor: side of an image over that of its latent.
        one_class, class_order: see `images.scan`.

    Raises ImageError: as `images.scan`, or no file is such a one.
    """

    def __init__(
        self,
        folder: Path,
        values: str = "posterior",
        scale: float = 0.18215,
        shift: float = 0.0,
        name: str = "",
        sha256: str = "",
        factor: int = 8,
        workers: int = 1,
        dtype: str = "float16",
        one_class: bool = False,
        class_order: str = "name",
    ):
        self.folder, self.stochastic, self.workers = Path(folder), values == "posterior", workers
        self.scan: Scan = scan(self.folder, SUFFIXES, one_class, class_order)
        example, first = self._first()
        channels, height, width = first[0].shape
        if self.stochastic and channels % 2:
            raise ImageError(
                f"{self.folder / example.path}: {channels} channels are no mean and log-variance;"
                " say that they are latents (--values latent)"
            )
        self.views = len(first)
        shape = (channels // (1 + self.stochastic), height, width)
        self.facts: dict[str, Any] = {
            "shape": shape,
            "dtype": dtype,
            "mirror": "stored" if self.views == 2 else "none",
            "stochastic": self.stochastic,
            "scale": (scale,) * shape[0],
            "shift": (shift,) * shape[0],
            "autoencoder": {"name": name, "kind": "AutoencoderKL" if self.stochastic else "", "sha256": sha256},
            "resolution": height * factor,
            "crop": "as published",
        }

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `encode.Source`. A file that cannot be read is left out; one of another shape ends the job."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="npz") as pool:
            for start in range(0, len(items), 256):
                batch = items[start : start + 256]
                for item, found in zip(batch, pool.map(self._record, batch), strict=True):
                    yield (item, None, found) if isinstance(found, str) else (item, found, "")

    def _first(self) -> tuple[Item, list[np.ndarray]]:
        """The first file that can be read, which says what all are like."""
        for item in self.scan.items:
            try:
                return item, self._arrays(item)
            except ImageError as error:
                told = error
        raise ImageError(f"none of {len(self.scan.items)} files can be read; {told}")

    def _record(self, item: Item) -> np.ndarray | str:
        try:
            arrays = self._arrays(item)
        except ImageError as error:
            return str(error)
        parts = 1 + self.stochastic
        expected = (self.facts["shape"][0] * parts, *self.facts["shape"][1:])
        if len(arrays) != self.views or any(array.shape != expected for array in arrays):
            raise ImageError(
                f"{self.folder / item.path}: holds {' and '.join(str(array.shape) for array in arrays)}, the first file"
                f" {self.views} of {expected}; all must be alike: remove or remake it"
            )
        record = np.stack(arrays).astype(np.float32).reshape(self.views, parts, *self.facts["shape"])
        if self.stochastic:
            np.clip(record[:, 1], *LOGVAR, out=record[:, 1])
        return record

    def _arrays(self, item: Item) -> list[np.ndarray]:
        """The arrays of a file: of the image, and of its mirror image if it is there."""
        path = self.folder / item.path
        if path.exists() and not path.is_file():
            raise ImageError(f"{path}: is no regular file")
        try:
            _refuse_bombs(path)
            with np.load(path, allow_pickle=False) as content:
                arrays = [content[name] for name in ("latent", "latent_flip") if name in content.files]
                if "latent" not in content.files:
                    raise ImageError(f"{path}: holds {', '.join(content.files) or 'nothing'}, but no `latent`")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{path}: {type(error).__name__}: {error}") from error
        if any(array.ndim != 3 or array.dtype.kind != "f" for array in arrays):
            found = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
            raise ImageError(f"{path}: holds {found}, not floating-point (C, H, W)")
        return arrays


def _refuse_bombs(path: Path) -> None:
    """Raises ValueError for an archive of large arrays, or whose headers promise such: numpy allocates it."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size > _LARGEST_ARRAY:
                raise ValueError(f"{record.filename} has {record.file_size:,} bytes, more than {_LARGEST_ARRAY:,}")
            if not record.filename.endswith(".npy"):
                continue
            with archive.open(record) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize > record.file_size:
                raise ValueError(f"{record.filename} does not hold an array of shape {shape}")
