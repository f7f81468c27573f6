"""Reads sets of images: an .npz in the layout of guided-diffusion, or a folder of pictures.

The .npz contains `arr_0`, uint8 (N, H, W, C), and `arr_1`, int64 labels (N,). Source: openai/guided-diffusion.
"""

from __future__ import annotations

import logging
import struct
import zipfile
from pathlib import Path

import numpy as np

from megapromoe.data.images import SUFFIXES, ImageError, hidden_note, is_hidden, open_image
from megapromoe.errors import UserError

logger = logging.getLogger(__name__)


class ImageSetError(UserError):
    """A set of images that cannot be read or written."""

    on_all_ranks = True


class ImageSet:
    """A complete set of images, read by ranges.

    Args:
        path: an .npz with `arr_0`, or a folder of pictures, which are read by `data.images.open_image` in the order of
            their names, without hidden files.

    Attributes:
        shape: (H, W, C) of each image.

    Raises ImageSetError if it does not exist or is something else.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if self.path.is_dir():
            pictures = [file for file in self.path.iterdir() if file.suffix.lower() in SUFFIXES]
            self._files = sorted(file for file in pictures if not is_hidden(file.name))
            if not self._files:
                raise ImageSetError(f"{path}: contains no picture ({', '.join(sorted(SUFFIXES))})")
            if hidden := [file.name for file in pictures if is_hidden(file.name)]:
                logger.info("%s: %s", path, hidden_note(hidden))
            self._images = None
            self.shape = self._picture(self._files[0]).shape
        else:
            self._images = open_array(self.path, "arr_0")
            shape = self._images.shape
            if self._images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
                raise ImageSetError(
                    f"{path}: arr_0 is {self._images.dtype} {shape}; images are uint8 (N, H, W, 1 or 3), one at least"
                )
            self.shape = self._images.shape[1:]

    def __len__(self) -> int:
        return len(self._files if self._images is None else self._images)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads images start .. stop - 1, uint8 (B, H, W, C). Raises ImageSetError, naming the picture."""
        if self._images is not None:
            return np.array(self._images[start:stop])
        pictures = []
        for file in self._files[start:stop]:
            picture = self._picture(file)
            if picture.shape != self.shape:
                raise ImageSetError(
                    f"{file}: is {picture.shape}, {self._files[0].name} {self.shape}; all pictures must have the same"
                    " shape"
                )
            pictures.append(picture)
        return np.stack(pictures)

    def _picture(self, file: Path) -> np.ndarray:
        try:
            pixels = np.asarray(open_image(file))
        except ImageError as error:
            raise ImageSetError(f"{file}: cannot be read ({error}); remove it, or write it again") from error
        return pixels[..., None] if pixels.ndim == 2 else pixels


def entries(path: Path) -> set[str]:
    """Names of the arrays in an .npz. Raises ImageSetError if it is not an .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageSetError(f"{path}: is not an .npz archive ({error})") from error


def open_array(path: Path, name: str) -> np.ndarray:
    """Opens an array of an .npz, as a memory map if it is not compressed. Raises ImageSetError."""
    names = entries(path)
    if name not in names:
        raise ImageSetError(f"{path}: has no {name} (it contains {', '.join(sorted(names))})")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                with archive.open(entry) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
        with open(path, "rb") as file:
            # Read the length of the local header: its extra field can differ from that in the directory.
            file.seek(entry.header_offset + 26)
            file.seek(entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise ImageSetError(
                    f"{path}: {name} contains objects, which only pickle could read; save it as numbers"
                )
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except ImageSetError:
        raise
    except Exception as error:  # numpy and zipfile raise exceptions of many types for damaged files
        raise ImageSetError(f"{path}: {name} cannot be read ({error}); write it again") from error
