"""Parquet files, and folders of Hugging Face `datasets` (`save_to_disk`), read through pyarrow.

Both hold Arrow tables with the description of `datasets` in their metadata, so that the library itself is not needed.
No program of a data set is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.data.tables.npy_files import read_npy
from megapromoe.data.tables.table import BLOCK, IMAGES, Fields, FilesTable, Labels, RecordError, TableError, chosen
from megapromoe.errors import UserError

_BUFFER = 1 << 22  # bytes
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
STATE, DESCRIPTION = "state.json", "dataset_info.json"  # of a folder of save_to_disk


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` has saved. Raises TableError."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        names = [file["filename"] for file in state["_data_files"]]
        indices = state.get("_indices_data_files")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TableError(f"{folder / STATE} cannot be read ({error!r}); save the data set again") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name or name == ".."]:
        raise TableError(f"{folder / STATE}: names {outside[0]!r}, which is not a file of its folder; save it again")
    if len(set(names)) < len(names) or not names:
        raise TableError(f"{folder / STATE}: does not name one or more different files; save the data set again")
    if indices:
        raise TableError(f"{folder}: holds a selection of its records; save it with flatten_indices().save_to_disk()")
    return [folder / name for name in names]


class ArrowTable(FilesTable):
    """Records in Parquet files or Arrow streams.

    Args:
        path: as the user gave it.
        files: of one of the two formats.
        kind: `table.IMAGES` or `table.LATENTS`.
        fields: names of the columns.

    Raises TableError if pyarrow is not installed, a file is damaged or has other columns, or a column is missing.
    """

    def __init__(self, path: Path, files: list[Path], kind: str, fields: Fields):
        super().__init__(path, files)
        self._pa, self.kind, self.fields = _library(), kind, fields
        schema: Any = None
        for file in self.files:
            with self._naming(file):
                count, file_schema = self._inspect(file)
            self.counts.append(count)
            if schema is None:
                schema = file_schema
            elif not file_schema.equals(schema):
                raise TableError(f"{file}: has other columns than {self.files[0]}; give files of one data set")
        names = schema.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise TableError(f"{self.files[0]}: two of its columns are named {twice[0]!r}; rename one")
        self._features = _features(schema)
        self._column = chosen(fields.data or self._of_type("Image", kind == IMAGES), kind, names, self.files[0])
        self._flip = chosen(fields.flip, "flip", names, self.files[0], is_needed=False) if kind != IMAGES else ""
        self._schema, self.views = schema, 1 + bool(self._flip)
        self._check_type(schema.field(self._column).type)

    def labels(self) -> Labels:
        column = chosen(
            self.fields.label or self._of_type("ClassLabel", True), "label", self._schema.names, self.files[0]
        )
        types, kind = self._pa.types, self._schema.field(column).type
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise TableError(
                f"{self.files[0]}: labels are whole numbers or text, column {column!r} is {kind}; give --label-field"
                " NAME of another column"
            )
        values: list[int | str | None] = []
        for file in self.files:
            with self._naming(file):
                for batch in self._batches(file, [column]):
                    values += batch.column(0).to_pylist()
        names = self._features.get(column, {}).get("names")
        return Labels(values, tuple(map(str, names)) if isinstance(names, list) else None)

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        columns = [self._column, self._flip] if self._flip else [self._column]
        for number, low, high in self.spans(start, stop):
            file, place = self.files[number], 0
            with self._naming(file, RecordError):
                for batch in self._batches(file, columns, low, high):
                    views = [self._values(batch.column(name), number, low + place) for name in columns]
                    yield from (list(record) for record in zip(*views, strict=True))
                    place += len(batch)

    def _of_type(self, kind: str, is_wanted: bool) -> str:
        """The only column of this type in the description of `datasets`, or ""."""
        names = [name for name, feature in self._features.items() if feature.get("_type") == kind]
        if is_wanted and len(names) > 1:
            option = "--data-field" if kind == "Image" else "--label-field"
            raise TableError(f"{self.path}: columns {', '.join(names)} are of type {kind}; give {option} NAME of one")
        return names[0] if is_wanted and names else ""

    def _check_type(self, kind: Any) -> None:
        types = self._pa.types
        if self.kind != IMAGES or types.is_binary(kind) or types.is_large_binary(kind):
            return
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return
        raise TableError(
            f"{self.files[0]}: images are the content of image files, column {self._column!r} is {kind}; give"
            " --data-field NAME of another column"
        )

    def _values(self, column: Any, number: int, first: int) -> list[Any]:
        """The images or latents of a column of a batch that starts with record `first` of a file."""
        if self.kind != IMAGES:
            return [self._latent(value, number, first + i) for i, value in enumerate(self._latents(column))]
        if not self._pa.types.is_struct(column.type):
            return column.to_pylist()
        records = column.to_pylist()
        for i, record in enumerate(records):
            if record and record["bytes"] is None and record.get("path"):
                raise RecordError(
                    f"{self.place(number, first + i)}: names the file {record['path']!r} instead of holding the image;"
                    " other files are not opened: save the data set with save_to_disk of datasets, which embeds them"
                )
        return [record and record["bytes"] for record in records]

    def _latents(self, column: Any) -> list[Any]:
        """An array for each record, None without a value, or a text that says what is wrong."""
        types, kind = self._pa.types, column.type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return [value and _npy(value) for value in column.to_pylist()]
        if isinstance(column, self._pa.FixedShapeTensorArray) and not column.null_count:
            return list(column.to_numpy_ndarray())
        if isinstance(kind, self._pa.BaseExtensionType):
            column = column.storage
        arrays = _nested(self._pa, column)
        if not isinstance(arrays, str):
            return list(arrays)
        single = (column.slice(i, 1) for i in range(len(column)))
        results = [None if part.null_count else _nested(self._pa, part) for part in single]
        return [result[0] if isinstance(result, np.ndarray) else result for result in results]

    def _latent(self, value: Any, number: int, record: int) -> np.ndarray | None:
        if isinstance(value, str):
            raise RecordError(f"{self.place(number, record)}: {value}")
        return value

    def _inspect(self, file: Path) -> tuple[int, Any]:
        """The number of records and the schema of a file."""
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(file) as opened:
                return opened.metadata.num_rows, opened.schema_arrow
        with self._pa.memory_map(str(file)) as source, self._pa.ipc.open_stream(source) as stream:
            count = sum(batch.num_rows for batch in stream)
        with open(file, "rb") as content:  # pyarrow takes a file that ends after a batch for complete
            content.seek(-len(_END), 2)
            if content.read() != _END:
                raise TableError(f"{file} is cut off: the mark at its end is missing; copy it or save it again")
        return count, stream.schema

    def _batches(self, file: Path, columns: list[str], start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Columns of the records start .. stop - 1 of a file, in batches of at most `BLOCK` records."""
        first = 0
        for batch in self._all_batches(file, columns, start):
            if isinstance(batch, int):  # records that were not read
                first += batch
                continue
            low, high = max(start - first, 0), batch.num_rows if stop is None else min(stop - first, batch.num_rows)
            for place in range(low, high, BLOCK):
                yield batch.slice(place, min(BLOCK, high - place))
            first += batch.num_rows
            if stop is not None and first >= stop:
                return

    def _all_batches(self, file: Path, columns: list[str], start: int) -> Iterator[Any]:
        """Batches of a file in order; a number in the place of row groups before `start`, which are not read."""
        if file.suffix != ".parquet":
            with self._pa.memory_map(str(file)) as source, self._pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    selected = batch.select(columns)
                    selected.validate(full=True)  # offsets that are damaged end the process when they are used
                    yield selected
            return
        import pyarrow.parquet as pq

        # A buffer: a row group may be larger than the memory.
        with pq.ParquetFile(file, page_checksum_verification=True, buffer_size=_BUFFER) as opened:
            groups, first = [], 0
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                if first + count > start:
                    groups.append(group)
                else:
                    yield count
                first += count
            if groups:
                for batch in opened.iter_batches(BLOCK, row_groups=groups, columns=columns):
                    yield batch.select(columns)

    def _naming(self, file: Path, kind: type[Exception] = TableError):
        return _NamedErrors(self._pa, file, kind)


class _NamedErrors:
    """A context around calls of pyarrow; its errors become a `TableError` or `RecordError` that names the file."""

    def __init__(self, pa: Any, file: Path, kind: type[Exception]):
        self.pa, self.file, self.kind = pa, file, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: Any, __: Any) -> None:
        # pyarrow raises exceptions of many types for damaged files; KeyboardInterrupt and the like are no `Exception`.
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = " ".join(str(error).split())
            raise self.kind(
                f"{self.file} cannot be read: {reason[:200]}; it is cut off or damaged: copy or write it again"
            ) from error


def _nested(pa: Any, column: Any) -> np.ndarray | str:
    """Nested lists of equal lengths as an array (records, ...), or a text that says why they are none."""
    import pyarrow.compute as pc

    shape = [len(column)]
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        if column.null_count:
            return "holds a list without a value"
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) != 1:
            return "holds lists of different lengths"
        shape.append(lengths[0])
        column = column.flatten()
    if not pa.types.is_floating(column.type):
        return f"holds {column.type}, not floating-point numbers"
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _npy(content: bytes) -> np.ndarray | str:
    """The array of a .npy file, or a text that says why it is none."""
    try:
        return read_npy(content)
    except ValueError as error:
        return f"is not the content of a .npy file ({error}); give latents as lists of numbers or .npy"


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The types of the columns as `datasets` describes them in the metadata; empty without a description."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _library() -> Any:
    """The pyarrow library. Raises TableError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise TableError("Parquet and folders of datasets need pyarrow: pip install 'megapromoe[data]'") from error
    return pyarrow
