"""Writes a set of many images in chunks, so that repeating the command continues an interrupted job.

The chunks are in `NAME.parts` beside the set, each written atomically, and a repeated command generates the missing
ones. The complete set is a folder of PNG files or an .npz, see `image_sets.py`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch import Tensor

from megapromoe import io
from megapromoe.diffusion.image_grid import chunk_ranges, to_bytes
from megapromoe.distributed.agreement import this_rank
from megapromoe.sampling.image_sets import ImageSetError, entries
from megapromoe.sampling.prompts import Prompt

logger = logging.getLogger(__name__)

PROMPTS = "prompts.jsonl"  # in a folder, a line for each image: its file and its prompt
REQUEST = "request"  # identity of the images of a set: `request.json` in a folder, an entry of an .npz
_PNG_END = b"IEND\xaeB`\x82"


class ImageSetWriter:
    """Writes `out`, a folder or an .npz; see `generation.ImageWriter`."""

    def __init__(
        self,
        out: Path,
        count: int,
        batch: int,
        shape: tuple[int, int, int],
        prompts: Sequence[Prompt] | None = None,
    ):
        """Args:
        out: path of the set.
        count: number of images of the set.
        batch: images per chunk; the last chunk may have fewer.
        shape: (H, W, C) of an image.
        prompts: have equally many images each; None: classes.
        """
        self.out, self.count, self.shape, self.prompts = Path(out), count, shape, prompts
        self.archive = self.out.suffix == ".npz"
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.ranges = chunk_ranges(count, batch)
        self._lock: IO[str] | None = None

    def open(self, identity: Mapping[str, Any]) -> list[int] | None:
        """Returns the missing chunks, or None if the set is complete. Locks the set until `close`.

        Raises ImageSetError if `out` is something else, has images of another request, or is locked by another process.
        """
        try:
            if (stored := self._finished()) is not None:
                self._compare(stored, identity, self.out)
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            file = self.folder / f"{REQUEST}.json"
            if file.exists() and not self._is_empty():
                self._compare(json.loads(file.read_text()), identity, self.folder)
            elif others := [p.name for p in self.folder.iterdir() if not self._is_overhead(p)]:
                raise ImageSetError(
                    f"{self.folder}: contains {others[0]}, which this command did not write; use another --out"
                )
            else:  # empty, or a request that failed before its first chunk: replace it
                io.write_text(file, json.dumps(identity, indent=2))
            return [chunk for chunk in range(len(self.ranges)) if not self._is_whole(chunk)]
        except (OSError, ValueError) as error:
            raise ImageSetError(f"out = {self.out}: {error}; give another path, or remove {self.folder}") from error

    def write(self, chunk: int, images_BCHW: Tensor) -> None:
        """Writes the images (B, C, H, W) of a chunk, about [-1, 1], as uint8. Raises OSError."""
        images = to_bytes(images_BCHW)
        if self.archive:
            with io.atomic_write(self._array(chunk)) as file:
                np.save(file, images)
            return
        for path, image in zip(self._pictures(chunk), images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with io.atomic_write(path) as file:
                Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="png")

    def finish(self, labels: np.ndarray) -> None:
        """Assembles `out` from all chunks atomically and removes their folder. Raises ImageSetError on rank 0."""
        if this_rank():
            return
        try:
            if self.archive:
                self._finish_archive(labels)
            else:
                self._finish_folder(labels)
        except OSError as error:
            raise ImageSetError(
                f"{self.out}: cannot be written ({error.strerror}); the chunks are kept in {self.folder}"
            ) from error

    def abandon(self) -> bool:
        """Removes the folder of chunks if it is empty, so that another request can use it; returns whether it did."""
        if self._lock is None:
            return True  # the set is complete and is kept
        try:
            if not self._is_empty():
                return False
            shutil.rmtree(self.folder)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Releases the lock, so that another process may continue the set."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _finish_folder(self, labels: np.ndarray) -> None:
        self._describe(labels)
        for leftover in [*self.folder.rglob(f"*{io.SUFFIX}"), *self.folder.glob("*.lock")]:
            leftover.unlink()
        io.commit(self.folder, self.out)

    def _describe(self, labels: np.ndarray) -> None:
        """Writes what each image of a folder shows. Raises OSError."""
        if self.prompts is None:
            with io.atomic_write(self.folder / "labels.npy") as file:
                np.save(file, labels)
            return
        files = [path.name for chunk in range(len(self.ranges)) for path in self._pictures(chunk)]
        records = [{"file": file} | self.prompts[p].record() for file, p in zip(files, labels, strict=True)]
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        io.write_text(self.folder / PROMPTS, lines)

    def _finish_archive(self, labels: np.ndarray) -> None:
        with (
            io.atomic_write(self.out) as out,
            zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in range(len(self.ranges)):
                    file.write(np.load(self._array(chunk), allow_pickle=False).tobytes())
            request = (self.folder / f"{REQUEST}.json").read_text()
            arrays = {"arr_1": labels, REQUEST: np.array(request)}
            if self.prompts is not None:
                arrays["prompts"] = np.array([prompt.text for prompt in self.prompts])
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        shutil.rmtree(self.folder)

    def _finished(self) -> dict[str, Any] | None:
        """The identity of the images of a complete set; None if it is not complete. Raises ImageSetError."""
        if self.archive and self.out.is_file():
            if REQUEST not in entries(self.out):
                raise ImageSetError(f"{self.out}: exists, and was not made by this command; use another --out")
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

    def _is_empty(self) -> bool:
        """Whether the folder of chunks contains no image."""
        return all(map(self._is_overhead, self.folder.iterdir()))

    @staticmethod
    def _is_overhead(path: Path) -> bool:
        """Whether a file in the folder of chunks is not an image: the lock, the request, an incomplete file."""
        return path.suffix in (".lock", io.SUFFIX) or path.name == f"{REQUEST}.json"

    def _compare(self, stored: Mapping[str, Any], identity: Mapping[str, Any], place: Path) -> None:
        if differing := [key for key in {**stored, **identity} if stored.get(key) != identity.get(key)]:
            listed = "; ".join(
                f"{key}: {stored.get(key)!r} stored, {identity.get(key)!r} requested" for key in differing
            )
            raise ImageSetError(
                f"{place}: contains images of another request ({listed}); use another --out, or remove it"
            )

    def _take_lock(self) -> None:
        file = io.open_regular(self.folder / "parts.lock", os.O_RDWR | os.O_CREAT)
        self._lock = open(file)  # noqa: SIM115, held until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ImageSetError(
                f"{self.folder}: another process generates these images; wait for it, or stop it"
            ) from error
        except OSError as error:  # some cluster file systems are mounted without locks
            logger.warning(
                "%s: this file system has no locks (%s); let only one job generate these images",
                self.folder,
                error.strerror,
            )

    def _array(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.npy"

    def _pictures(self, chunk: int) -> list[Path]:
        width = max(6, len(str(self.count - 1)))  # zero-padded, so that sorting by name keeps the order
        return [self.folder / f"{i:0{width}d}.png" for i in self.ranges[chunk]]

    def _is_whole(self, chunk: int) -> bool:
        if not self.archive:
            return all(map(_is_whole_picture, self._pictures(chunk)))
        try:
            array = np.load(self._array(chunk), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return array.shape == (len(self.ranges[chunk]), *self.shape)


def _is_whole_picture(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            f.seek(-len(_PNG_END), os.SEEK_END)
            return f.read() == _PNG_END
    except OSError:
        return False
