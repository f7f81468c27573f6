"""WebDataset tars of classes: a sample is an image or a .npy latent, and a .cls with its label.

`.cls` holds a number or the name of a class; without it, `.json` with "label" or "cls" does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megapromoe.data.images import SUFFIXES
from megapromoe.data.tables.npy_files import read_npy
from megapromoe.data.tables.table import IMAGES, Fields, Labels, RecordError, Table, TableError
from megapromoe.data.tars import Member, Sample, TarFiles

LABEL_ENDINGS, LABEL_KEYS = ("cls", "label.txt", "class"), ("label", "cls", "class_id")
_LONGEST_LABEL = 1 << 16  # bytes


class TarTable(Table):
    """Samples of uncompressed tars.

    Args:
        path: as the user gave it.
        files: in order.
        kind: `table.IMAGES` or `table.LATENTS`.
        fields: endings of the names in a sample, such as "image.png".

    Raises TableError or TarError if a tar is damaged, or a sample holds no image or latent.
    """

    def __init__(self, path: Path, files: list[Path], kind: str, fields: Fields):
        self.path, self.kind, self.fields = path, kind, fields
        self._tars = TarFiles(files)
        self._samples: list[tuple[str, Member, Member | None, Sample]] = []
        for sample in self._tars.samples():
            data = self._member(sample)
            if data is None:
                holds = ", ".join(f".{ending}" for ending in sample.members)
                what = "an image" if kind == IMAGES else "a .npy latent"
                raise TableError(f"{path}: sample {sample.name} holds {holds}, but not {what}; complete or remove it")
            flip = sample.members.get(fields.flip or "flip.npy") if kind != IMAGES else None
            self._samples.append((data.path, data, flip, sample))
        self.views = 1 + bool(self._samples and self._samples[0][2])
        for name, _, flip, _ in self._samples:
            if (flip is None) == (self.views == 2):
                raise TableError(f"{path}: {name} {'lacks' if flip is None else 'has'} the latent of the mirror image,"
                                 " unlike the first sample; write them for all samples or for none")  # fmt: skip

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, row: int) -> str:
        return self._samples[row][0]

    def labels(self) -> Labels:
        texts = [self._label(sample) for *_, sample in self._samples]
        if all(text is None or text.isascii() and text.lstrip("-").isdecimal() for text in texts):
            return Labels([None if text is None else int(text) for text in texts])
        return Labels(texts)

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        for name, data, flip, _ in self._samples[start:stop]:
            contents = [self._tars.read(member) for member in (data, flip) if member is not None]
            if self.kind == IMAGES:
                yield list(contents)
                continue
            try:
                yield [read_npy(content) for content in contents]
            except ValueError as error:
                raise RecordError(f"{self.path}: {name}: is not the content of a .npy file: {error}") from error

    def _member(self, sample: Sample) -> Member | None:
        if self.fields.data:
            return sample.members.get(self.fields.data.lstrip(".").lower())
        if self.kind == IMAGES:
            return next((member for ending, member in sample.members.items() if f".{ending}" in SUFFIXES), None)
        names = ("npy", "latent.npy", "latents.npy")
        return next((sample.members[ending] for ending in names if ending in sample.members), None)

    def _label(self, sample: Sample) -> str | None:
        """The label of a sample as text; None without one."""
        endings = (self.fields.label.lstrip(".").lower(),) if self.fields.label else LABEL_ENDINGS
        if member := next((sample.members[ending] for ending in endings if ending in sample.members), None):
            return self._text(member) or None
        if self.fields.label or "json" not in sample.members:
            return None
        try:
            content = json.loads(self._text(sample.members["json"]))
        except (ValueError, RecursionError) as error:
            raise TableError(f"{self.path}: {sample.members['json'].path} is not JSON ({error}); correct it") from error
        values = [content[key] for key in LABEL_KEYS if key in content] if isinstance(content, dict) else []
        return str(values[0]) if values and isinstance(values[0], (int, str)) else None

    def _text(self, member: Member) -> str:
        if member.size > _LONGEST_LABEL:
            raise TableError(f"{self.path}: {member.path} has {member.size:,} bytes, too many for a label; correct it")
        try:
            return self._tars.read(member).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise TableError(f"{self.path}: {member.path} is not UTF-8; correct it") from error
