"""The protocol of a table: records in a fixed order, each with an image or a latent and with a label.

Readers of the formats are beside this file; `opening.py` finds the one for a path. Opening reads names, counts and
labels. Images and latents are read later, in ranges.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapromoe.data.images import ImageError

IMAGES, LATENTS = "images", "latents"
# Names that are looked for if none is given, most usual first; in lower case.
KNOWN_NAMES = {
    IMAGES: ("image", "img", "images", "jpg", "png", "webp"),
    LATENTS: ("latents", "latent", "features", "feature", "moments", "vae", "z", "x"),
    "label": ("label", "labels", "cls", "class", "classes", "target", "targets", "y"),
    "flip": ("latents_flip", "latent_flip", "features_flip", "moments_flip", "flip"),
}
OPTIONS = {IMAGES: "--data-field", LATENTS: "--data-field", "label": "--label-field", "flip": "--flip-field"}
BLOCK = 64  # records that are read at once


class TableError(ImageError):
    """A table cannot be opened."""

    on_all_ranks = True  # every rank opens the same files


class RecordError(ImageError):
    """A record of a table cannot be used; the rank that reads it raises this."""


@dataclass(frozen=True)
class Fields:
    """Names of the columns or data sets; "": found by their usual names."""

    data: str = ""
    label: str = ""
    flip: str = ""


@dataclass(frozen=True)
class Labels:
    """The labels of all records.

    Attributes:
        values: whole numbers or text; None for a record without a label.
        names: of the classes 0, 1, ..., if the format has them.
    """

    values: Sequence[int | str | None]
    names: tuple[str, ...] | None = None


class Table(ABC):
    """Records in a fixed order.

    Attributes:
        path: the file or folder, for messages.
        views: values of a record: 2 if it also holds the latent of the mirror image.
        holds_deviations: the format says that latents are a mean above a standard deviation.
    """

    path: Path
    views = 1
    holds_deviations = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The name of a record, different for each."""

    @abstractmethod
    def labels(self) -> Labels:
        """The labels of all records. Raises TableError if there are none."""

    @abstractmethod
    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        """The values of records start .. stop - 1 in order: the content of an image file, or a latent of any shape.

        A latent may be followed by that of the mirror image, see `views`. None: the record holds no value. Raises
        RecordError.
        """


class FilesTable(Table):
    """A table of one or more files.

    Args:
        path: as the user gave it.
        files: in order.

    Attributes:
        counts: records of each file, set by subclasses.
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, list(files)
        folder = os.path.commonpath([file.parent for file in self.files])
        self._names = [Path(os.path.relpath(file, folder)).as_posix() for file in self.files]
        self.counts: list[int] = []

    def __len__(self) -> int:
        return sum(self.counts)

    def name(self, row: int) -> str:
        ends = np.cumsum(self.counts)
        number = int(np.searchsorted(ends, row, side="right"))
        return f"{self._names[number]}#{row - (int(ends[number - 1]) if number else 0)}"

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The number of each file that holds records of start .. stop - 1, with its first and last one + 1 of them."""
        first = 0
        for number, count in enumerate(self.counts):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield number, low, high
            first += count

    def place(self, number: int, record: int) -> str:
        """A record of a file, for messages."""
        return f"{self.files[number]}, record {record}"


def chosen(given: str, role: str, names: Sequence[str], where: Path, is_needed: bool = True) -> str:
    """The name of the column or data set with a role.

    Args:
        given: by the user, "" if not.
        role: a key of `KNOWN_NAMES`.
        names: those that exist.
        is_needed: raise for a missing one; otherwise "" is returned if none was given.
    """
    listed = ", ".join(names) or "nothing"
    if given:
        if given not in names:
            raise TableError(f"{where}: has no {given!r} ({OPTIONS[role]}); it holds {listed}")
        return given
    known = KNOWN_NAMES[role]
    matches = sorted((known.index(name.lower()), name) for name in names if name.lower() in known)
    if matches:
        return matches[0][1]
    if is_needed:
        remedy = " or --one-class if all records are of one class" if role == "label" else ""
        what = "label" if role == "label" else role
        raise TableError(
            f"{where}: none of its fields has a usual name of {what} ({', '.join(known)}); it holds {listed}: give"
            f" {OPTIONS[role]} NAME{',' + remedy if remedy else ''}"
        )
    return ""
