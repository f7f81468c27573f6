"""Published latents, one .npz file per image (arrays `latent` and `latent_flip`), as a source of the encoding job.

Source: the files that the scripts of ProMoE's release create from ImageNet: folder/CLASS/NAME.latent.npz, float32
(8, 32, 32): the unscaled parameters of the SD-VAE's posterior, 4 channels of mean followed by 4 of log-variance.
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
LOGVAR = (-30.0, 20.0)  # diffusers clips the log-variance to this range when it samples; the files are not clipped
VALUES = ("posterior", "latent")


def imported_fields(
    shape: tuple[int, int, int],
    dtype: str,
    views: int,
    stochastic: bool,
    scale: float,
    shift: float,
    resolution: int,
    name: str = "",
    sha256: str = "",
) -> dict[str, Any]:
    """The fields of the manifest of latents that another program has encoded; arguments as for `PublishedLatents`."""
    return {
        "shape": shape,
        "dtype": dtype,
        "mirror": "stored" if views == 2 else "none",
        "stochastic": stochastic,
        "scale": (scale,) * shape[0],
        "shift": (shift,) * shape[0],
        "autoencoder": {"name": name, "kind": "AutoencoderKL" if stochastic else "", "sha256": sha256},
        "resolution": resolution,
        "crop": "as published",
    }


class PublishedLatents:
    """A folder of published latents.

    Args:
        values: content of the arrays: "posterior", channels of mean and log-variance; or "latent", a single value.
        scale, shift: latents are `(raw - shift) * scale`, for all channels.
        name: the autoencoder that made them, as for `autoencoder.open_autoencoder`.
        sha256: SHA-256 of its weights; "" if unknown.
        factor: side of an image divided by the side of its latent.
        workers: threads that read files.
        dtype: type of the stored latents, "float16" or "float32".
        one_class, class_order: see `images.scan`.

    Raises ImageError as `images.scan`, or if no file can be read.
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
                f"{self.folder / example.path}: {channels} channels cannot be a mean and a log-variance;"
                " give --values latent if the files hold latents"
            )
        self.views = len(first)
        shape = (channels // (1 + self.stochastic), height, width)
        self.manifest_fields: dict[str, Any] = imported_fields(
            shape, dtype, self.views, self.stochastic, scale, shift, height * factor, name, sha256
        )

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `encode.Source`. A file that cannot be read is skipped; raises ImageError for one of another shape."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="npz") as pool:
            for start in range(0, len(items), 256):
                batch = items[start : start + 256]
                for item, result in zip(batch, pool.map(self._record, batch), strict=True):
                    yield (item, None, result) if isinstance(result, str) else (item, result, "")

    def _first(self) -> tuple[Item, list[np.ndarray]]:
        """The first file that can be read, and its arrays, which give the shape of all files."""
        for item in self.scan.items:
            try:
                return item, self._arrays(item)
            except ImageError as error:
                problem = error
        raise ImageError(f"none of {len(self.scan.items)} files can be read; {problem}")

    def _record(self, item: Item) -> np.ndarray | str:
        try:
            arrays = self._arrays(item)
        except ImageError as error:
            return str(error)
        parts = 1 + self.stochastic
        expected = (self.manifest_fields["shape"][0] * parts, *self.manifest_fields["shape"][1:])
        if len(arrays) != self.views or any(array.shape != expected for array in arrays):
            raise ImageError(
                f"{self.folder / item.path}: holds {' and '.join(str(array.shape) for array in arrays)}, the first file"
                f" {self.views} of {expected}; all files must have the same shapes: remove this file or create it again"
            )
        record = np.stack(arrays).astype(np.float32).reshape(self.views, parts, *self.manifest_fields["shape"])
        if self.stochastic:
            np.clip(record[:, 1], *LOGVAR, out=record[:, 1])
        return record

    def _arrays(self, item: Item) -> list[np.ndarray]:
        """The arrays of a file: of the image and, if the file has it, of the mirror image."""
        path = self.folder / item.path
        if path.exists() and not path.is_file():
            raise ImageError(f"{path}: is not a regular file")
        try:
            _refuse_bombs(path)
            with np.load(path, allow_pickle=False) as content:
                arrays = [content[name] for name in ("latent", "latent_flip") if name in content.files]
                if "latent" not in content.files:
                    raise ImageError(f"{path}: holds {', '.join(content.files) or 'nothing'}, but no `latent`")
        except ImageError:
            raise
        except Exception as error:  # numpy and zipfile raise exceptions of many types for damaged files
            raise ImageError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if any(array.ndim != 3 or array.dtype.kind != "f" for array in arrays):
            types = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
            raise ImageError(f"{path}: holds {types}, not floating-point (C, H, W)")
        return arrays


def _refuse_bombs(path: Path) -> None:
    """Raises ValueError for an archive with large arrays, or with headers that claim large arrays.

    numpy allocates the memory that a header claims before it reads the values.
    """
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
