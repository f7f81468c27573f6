"""Safetensors files of latents as VA-VAE and its successors write them: `latents`, `latents_flip`, `labels`.

Source: LightningDiT, extract_features.py: latents_rank00_shard000.safetensors, latents (N, C, H, W), labels (N,).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megapromoe.data.tables.table import BLOCK, LATENTS, Fields, FilesTable, Labels, RecordError, TableError, chosen


class TensorTable(FilesTable):
    """Records in safetensors files.

    Args:
        path: as the user gave it.
        files: in order; with equal names of tensors.
        fields: names of the tensors.

    Raises TableError if a file is damaged, or a tensor is missing or of another form.
    """

    def __init__(self, path: Path, files: list[Path], fields: Fields):
        super().__init__(path, files)
        self.fields, self._data, self._flip = fields, "", ""
        for file in self.files:
            with _opened(file, TableError) as content:
                names = sorted(content.keys())
                data = chosen(fields.data, LATENTS, names, file)
                flip = chosen(fields.flip, "flip", names, file, is_needed=False)
                if self.counts and (data, flip) != (self._data, self._flip):
                    raise TableError(f"{file}: has other tensors than {self.files[0]}; give files of one kind")
                self._data, self._flip = data, flip
                shapes = {name: tuple(content.get_slice(name).get_shape()) for name in filter(None, (data, flip))}
            for name, shape in shapes.items():
                if len(shape) < 2:
                    raise TableError(f"{file}: {name} has shape {shape}, not (N, C, H, W); give --data-field NAME")
            if len({shape[0] for shape in shapes.values()}) > 1:
                listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                raise TableError(f"{file}: its tensors have different numbers of records: {listed}; write it again")
            self.counts.append(shapes[data][0])
        self.views = 1 + bool(self._flip)

    def labels(self) -> Labels:
        values: list[int | str | None] = []
        for file, count in zip(self.files, self.counts, strict=True):
            with _opened(file, TableError) as content:
                name = chosen(self.fields.label, "label", sorted(content.keys()), file)
                label = content.get_tensor(name)
            if label.dtype.is_floating_point or label.dtype.is_complex or label.dtype == torch.bool:
                raise TableError(f"{file}: {name} is {label.dtype}; labels are whole numbers: give --label-field NAME")
            if tuple(label.shape) not in ((count,), (count, 1)):
                raise TableError(
                    f"{file}: {name} has shape {tuple(label.shape)}, not ({count},): there must be one label for each"
                    f" of the {count:,} latents; give --label-field NAME of the labels"
                )
            values += label.reshape(-1).tolist()
        return Labels(values)

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        names = [name for name in (self._data, self._flip) if name]
        for number, low, high in self.spans(start, stop):
            with _opened(self.files[number], RecordError) as content:
                slices = [content.get_slice(name) for name in names]
                for first in range(low, high, BLOCK):
                    blocks = [part[first : min(first + BLOCK, high)] for part in slices]
                    if any(not block.is_floating_point() for block in blocks):
                        raise RecordError(f"{self.place(number, first)}: latents are not floating-point numbers")
                    yield from (list(views) for views in zip(*(block.float().numpy() for block in blocks), strict=True))


@contextmanager
def _opened(file: Path, kind: type[Exception]) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise kind(f"{file} cannot be read: {reason}; it is cut off or damaged: copy or write it again") from error
