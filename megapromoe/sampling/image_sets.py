"""Sets of pixels in files: one .npz in the layout of guided-diffusion, or a folder of pictures.

The .npz holds `arr_0`, uint8 (N, H, W, C), and `arr_1`, int64 labels (N,). Source: openai/guided-diffusion.

A set that is being made lies beside its name, in `NAME.parts`, chunk by chunk; what is there is whole, so that a
repeated command goes on with what is missing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from megapromoe.errors import UserError
from megapromoe.io import sync

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REQUEST = "request"  # what a set was made from: `request.json` in a folder, an entry of an .npz
_PNG_END = b"IEND\xaeB`\x82"


class ImageSetError(UserError):
    """A set of images that cannot be read, or not be made here."""

    on_all_ranks = True


class ImageSet:
    """A finished set of images, read in stretches.

    Args:
        path: an .npz with `arr_0`, or a folder of pictures (their order is that of their names).

    Raises ImageSetError: it is not there, or no such thing.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if self.path.is_dir():
            self._files = sorted(f for f in self.path.iterdir() if f.suffix.lower() in PICTURES)
            if not self._files:
                raise ImageSetError(f"{path}: holds no picture ({', '.join(PICTURES)})")
            self._images = None
            self.shape = self._picture(self._files[0]).shape
        else:
            self._images = open_array(self.path, "arr_0")
            if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[3] not in (1, 3):
                raise ImageSetError(
                    f"{path}: arr_0 is {self._images.dtype} {self._images.shape}; images are uint8 (N, H, W, 1 or 3)"
                )
            self.shape = self._images.shape[1:]

    def __len__(self) -> int:
        return len(self._files if self._images is None else self._images)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1, uint8 (B, H, W, C). Raises ImageSetError naming the picture that is wrong."""
        if self._images is not None:
            return np.array(self._images[start:stop])
        pictures = []
        for file in self._files[start:stop]:
            picture = self._picture(file)
            if picture.shape != self.shape:
                raise ImageSetError(
                    f"{file}: is {picture.shape}, {self._files[0].name} {self.shape}; all must be alike"
                )
            pictures.append(picture)
        return np.stack(pictures)

    def _picture(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise ImageSetError(f"{file}: cannot be read ({error}); remove it, or write it again") from error
        return pixels[..., None] if pixels.ndim == 2 else pixels


def entries(path: Path) -> set[str]:
    """Names of the arrays of an .npz. Raises ImageSetError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageSetError(f"{path}: is no .npz archive ({error})") from error


def open_array(path: Path, name: str) -> np.ndarray:
    """An array of an .npz; where it is not compressed it stays on disk, however large. Raises ImageSetError."""
    found = entries(path)
    if name not in found:
        raise ImageSetError(f"{path}: has no {name} (it holds {', '.join(sorted(found))})")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                with archive.open(entry) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
        with open(path, "rb") as file:
            # The local header has a length of its own: its extra field is not the directory's.
            file.seek(entry.header_offset + 26)
            file.seek(entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise ImageSetError(f"{path}: {name} holds Python objects, which only pickle could read")
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        raise ImageSetError(f"{path}: {name} cannot be read ({error}); write it again") from error


class Parts:
    """An image set in the making. `out` is a folder or an .npz; chunk c holds images c·batch .. at most (c + 1)·batch.

    Any rank may `write`; one process of a job, rank 0, calls the others.
    """

    def __init__(self, out: Path, count: int, batch: int, shape: tuple[int, int, int]):
        """Args: `shape` (H, W, C) of an image."""
        self.out, self.count, self.batch, self.shape = Path(out), count, batch, shape
        self.archive = self.out.suffix == ".npz"
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.chunks = -(-count // batch)
        self._lock: IO[str] | None = None

    def open(self, request: Mapping[str, Any]) -> list[int] | None:
        """Takes up a set where it was left: the chunks that are missing; None if the set is finished.

        Raises ImageSetError: `out` is something else, of another request, or being made by another process.
        """
        try:
            if (stored := self._finished()) is not None:
                self._compare(stored, request, self.out)
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            file = self.folder / f"{REQUEST}.json"
            if file.exists():
                self._compare(json.loads(file.read_text()), request, self.folder)
            elif others := [p.name for p in self.folder.iterdir() if p.suffix not in (".lock", ".writing")]:
                raise ImageSetError(
                    f"{self.folder}: holds {others[0]}, which is not of this command; use another --out"
                )
            else:
                _replace(file, json.dumps(request, indent=2).encode())
            return [chunk for chunk in range(self.chunks) if not self._whole(chunk)]
        except (OSError, ValueError) as error:
            if isinstance(error, ImageSetError):
                raise
            raise ImageSetError(f"out = {self.out}: {error}; give another path, or remove {self.folder}") from error

    def write(self, chunk: int, images: np.ndarray) -> None:
        """Keeps the images of a chunk, uint8 (B, H, W, C). Raises OSError."""
        if self.archive:
            file = self._array(chunk)
            aside = file.with_name(f"{file.name}.writing")
            with open(aside, "wb") as f:
                np.save(f, images)
            sync(aside)
            os.replace(aside, file)
            return
        for file, image in zip(self._pictures(chunk), images, strict=True):
            aside = file.with_name(f"{file.name}.writing")
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(aside, format="png")
            os.replace(aside, file)

    def finish(self, labels: np.ndarray) -> None:
        """Makes `out` of all chunks, as a whole, and removes what lay aside. Raises OSError."""
        if not self.archive:
            with open(self.folder / "labels.npy", "wb") as f:
                np.save(f, labels)
            self._clear()
            os.replace(self.folder, self.out)
            sync(self.out.parent)
            return
        aside = self.out.with_name(f"{self.out.name}.writing")
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in range(self.chunks):
                    file.write(np.load(self._array(chunk), allow_pickle=False).tobytes())
            request = (self.folder / f"{REQUEST}.json").read_text()
            for name, array in (("arr_1", labels), (REQUEST, np.array(request))):
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        sync(aside)
        os.replace(aside, self.out)
        sync(self.out.parent)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Gives the set free for another process."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _finished(self) -> dict[str, Any] | None:
        if self.archive and self.out.is_file():
            if REQUEST not in entries(self.out):
                raise ImageSetError(f"{self.out}: is there, and was not made by this command; use another --out")
            with np.load(self.out, allow_pickle=False) as stored:
                return json.loads(str(stored[REQUEST]))
        if not self.archive and self.out.is_dir() and any(self.out.iterdir()):
            file = self.out / f"{REQUEST}.json"
            if not file.is_file():
                raise ImageSetError(f"{self.out}: is not empty, and was not made by this command; use another --out")
            return json.loads(file.read_text())
        if self.out.exists() and self.archive == self.out.is_dir():
            raise ImageSetError(f"{self.out}: is a {'folder' if self.archive else 'file'}; use another --out")
        return None

    def _compare(self, stored: Mapping[str, Any], request: Mapping[str, Any], where: Path) -> None:
        apart = [key for key in {**stored, **request} if stored.get(key) != request.get(key)]
        if apart:
            said = "; ".join(f"{key}: {stored.get(key)!r} there, {request.get(key)!r} asked" for key in apart)
            raise ImageSetError(f"{where}: holds images of another request ({said}); use another --out, or remove it")

    def _take_lock(self) -> None:
        self._lock = open(self.folder / "parts.lock", "a")  # noqa: SIM115, held while we live
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ImageSetError(f"{self.folder}: another process draws these images; wait, or stop it") from error
        except OSError as error:  # some cluster file systems are mounted without locks
            logger.warning("%s: no locks here (%s); let only one job draw these images", self.folder, error.strerror)

    def _clear(self) -> None:
        for left in [*self.folder.glob("*.writing"), *self.folder.glob("*.lock")]:
            left.unlink()

    def _array(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.npy"

    def _pictures(self, chunk: int) -> Sequence[Path]:
        stretch = range(chunk * self.batch, min((chunk + 1) * self.batch, self.count))
        width = max(6, len(str(self.count - 1)))  # so that the order of the names is that of the images
        return [self.folder / f"{i:0{width}d}.png" for i in stretch]

    def _whole(self, chunk: int) -> bool:
        if not self.archive:
            return all(map(_whole_picture, self._pictures(chunk)))
        try:
            there = np.load(self._array(chunk), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return there.shape == (min(self.batch, self.count - chunk * self.batch), *self.shape)


def _whole_picture(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            f.seek(-len(_PNG_END), os.SEEK_END)
            return f.read() == _PNG_END
    except OSError:
        return False


def _replace(file: Path, content: bytes) -> None:
    aside = file.with_name(f"{file.name}.writing")
    aside.write_bytes(content)
    sync(aside)
    os.replace(aside, file)
