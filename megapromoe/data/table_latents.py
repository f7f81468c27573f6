"""Latents of a table as a source of the encoding job: checked, and read in the order of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megapromoe.data.images import Item, Scan
from megapromoe.data.importing import LOGVAR, imported_fields
from megapromoe.data.tables.classes import TableItem
from megapromoe.data.tables.table import RecordError, Table, TableError

VALUES = ("latent", "posterior", "mean_std")


class TableLatents:
    """The latents of a table.

    Args:
        table: see `tables.opening.open_table`.
        scan: its records with their classes, see `tables.classes.table_scan`.
        values: "latent": a value; "posterior": channels of mean and log-variance; "mean_std": of mean and standard
            deviation; "": as the format of the table says, else a value.
        scale, shift: latents are `(raw - shift) * scale`; a number for all channels.
        resolution: side of the images in pixels; None: 8 times that of the latents.
        dtype: type of the stored latents, "float16" or "float32".

    Raises TableError if the first record holds no latent of three dimensions, or its channels cannot be halved.
    """

    def __init__(
        self,
        table: Table,
        scan: Scan,
        values: str = "",
        scale: float = 1.0,
        shift: float = 0.0,
        resolution: int | None = None,
        dtype: str = "float16",
    ):
        self.table, self.scan = table, scan
        self.content = values or ("mean_std" if table.holds_deviations else "latent")
        self.stochastic = self.content != "latent"
        where = f"{table.path}, {table.name(0)}"
        first = next(table.values(0, 1))[0]
        if not isinstance(first, np.ndarray) or first.ndim != 3 or 0 in first.shape:
            what = f"has shape {first.shape}" if isinstance(first, np.ndarray) else "holds no latent"
            raise TableError(f"{where}: {what}, not (C, H, W); give --data-field NAME of the latents")
        channels, height, width = self._shape = first.shape
        if height != width:
            raise TableError(f"{where}: is {height}x{width}; models take square latents: crop them")
        if self.stochastic and channels % 2:
            raise TableError(
                f"{where}: {channels} channels cannot be halves of mean and variance; give --values"
                " latent if these are latents"
            )
        shape = (channels // (1 + self.stochastic), height, width)
        self.manifest_fields: dict[str, Any] = imported_fields(
            shape, dtype, table.views, self.stochastic, scale, shift, resolution or height * 8
        )

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `encode.Source`. Raises RecordError for a record of another shape or with values that are not finite."""
        if not items:
            return
        first, last = items[0], items[-1]
        assert isinstance(first, TableItem) and isinstance(last, TableItem) and last.row - first.row == len(items) - 1
        for item, views in zip(items, self.table.values(first.row, last.row + 1), strict=True):
            yield item, self._record(item, views), ""

    def _record(self, item: Item, views: list[Any]) -> np.ndarray:
        where = f"{self.table.path}, {item.path}"
        for view in views:
            if view is None:
                raise RecordError(f"{where}: holds no latent; remove the record or encode it again")
            if view.shape != self._shape:
                raise RecordError(
                    f"{where}: has shape {view.shape}, the first record {self._shape}; all must have the same shape:"
                    " remove the record or encode it again"
                )
            if not np.isfinite(view).all():
                raise RecordError(f"{where}: holds values that are not finite; remove the record or encode it again")
        parts = 1 + self.stochastic
        record = np.stack(views).astype(np.float32).reshape(len(views), parts, *self.manifest_fields["shape"])
        if self.content == "mean_std":
            if (record[:, 1] < 0).any():
                raise RecordError(
                    f"{where}: the second half of its channels has negative values, which are no standard deviations;"
                    " give --values posterior for log-variances"
                )
            with np.errstate(divide="ignore"):
                record[:, 1] = 2 * np.log(record[:, 1])
        if self.stochastic:
            np.clip(record[:, 1], *LOGVAR, out=record[:, 1])
        return record
