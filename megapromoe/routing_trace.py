"""The routing trace of a run: how many rows each expert got from each data-parallel rank, in recorded steps.

A training run with `train.routing_trace_every` appends records to routing_trace.jsonl of its folder, one line each::

    {"step": 20, "ep": 2, "group": 2, "blocks": [1, 3], "shape": [4, 2, 8], "owners": null, "rows": "eNpj...",
     "crc32": "1c291ca3"}

`rows` is base64 of a zlib stream of R·M·E little-endian uint32 numbers, for R data-parallel ranks, M MoE layers and E
experts: first the lowest byte of all numbers, then the next one, because most high bytes are zero. `owners` are M·E
uint16 numbers of the same form, the expert-parallel rank of each expert; null: ranks have consecutive experts. `crc32`
is the checksum of the line up to the comma before it. A row is a token and one of its experts; dropped ones count too.

Readers need no torch. `read_trace` returns the sums over ranks, `read_records` also the ranks.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.errors import UserError

TRACE_FILE = "routing_trace.jsonl"
_LINE = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}')
_KEYS = ("step", "ep", "group", "blocks", "shape", "owners", "rows")
_MAX_NUMBERS = 1 << 28  # a line with more is damaged; they would take 1 GiB


class TraceError(UserError):
    """A routing trace that does not exist, is damaged, or does not fit what it is used for."""


@dataclass(frozen=True)
class TraceRecord:
    """The rows of one optimizer step, summed over its micro-batches.

    Attributes:
        step: number of completed steps, from 1.
        blocks: the block of each MoE layer.
        rows_RME: rows that the tokens of each data-parallel rank sent to each expert of each layer, int64 (R, M, E).
            The ranks are in the order of the data-parallel group.
        ep: expert-parallel ranks.
        group: the smallest number of consecutive data-parallel ranks whose rows stay in expert-parallel groups of
            their own: lcm(ep·etp, tp) / tp. Mostly that is one group; with ep·etp < tp it is several, over which the
            rows of one data-parallel rank are divided.
        owner_ME: the expert-parallel rank, 0 to ep - 1, that had each expert, (M, E); None: `consecutive_owners`.
            Copies on other ranks are not recorded: `rows_of_ranks` counts all rows of an expert for its owner.
    """

    step: int
    blocks: tuple[int, ...]
    rows_RME: np.ndarray
    ep: int
    group: int
    owner_ME: np.ndarray | None = None

    @property
    def rows_ME(self) -> np.ndarray:
        """Rows of each layer and expert over all ranks, int64 (M, E)."""
        return self.rows_RME.sum(0)

    def rows_of_ranks(self, owner_ME: np.ndarray | None = None) -> np.ndarray:
        """Rows that each expert-parallel rank processes, int64 (groups, M, ep).

        If `group` stands for several expert-parallel groups, these are sums over them.

        Args:
            owner_ME: other owners of the experts; None: those of the record.

        Raises ValueError if `owner_ME` has another shape or names other ranks.
        """
        R, M, E = self.rows_RME.shape
        if owner_ME is None:
            owner_ME = self.owner_ME
        if owner_ME is None:
            owner_ME = np.tile(consecutive_owners(E, self.ep), (M, 1))
        if owner_ME.shape != (M, E) or owner_ME.min() < 0 or owner_ME.max() >= self.ep:
            raise ValueError(f"owner_ME must be ({M}, {E}), with ranks from 0 to {self.ep - 1}")
        rows_GME = self.rows_RME.reshape(R // self.group, self.group, M, E).sum(1)
        rows_GMP = np.zeros((len(rows_GME), M, self.ep), dtype=np.int64)
        for layer in range(M):
            for rank in range(self.ep):
                rows_GMP[:, layer, rank] = rows_GME[:, layer, owner_ME[layer] == rank].sum(-1)
        return rows_GMP


@dataclass(frozen=True)
class Trace:
    """The recorded steps of a run, summed over ranks.

    Attributes:
        steps_N: the steps of the N records, int64, ascending.
        blocks: the block of each of the M MoE layers.
        rows_NME: rows of each record, layer and expert, int64 (N, M, E). A layer without rows (a batch of null images)
            is all zero.
    """

    steps_N: np.ndarray
    blocks: tuple[int, ...]
    rows_NME: np.ndarray


def consecutive_owners(experts: int, ep: int) -> np.ndarray:
    """The expert-parallel rank of each expert, (E,), if ranks have consecutive experts, the first E % ep one more."""
    base, extra = divmod(experts, ep)
    return np.repeat(np.arange(ep), [base + (rank < extra) for rank in range(ep)])


def fullest_over_mean(rows: np.ndarray) -> np.ndarray:
    """Largest number of rows over the mean, along the last dimension; NaN where there are no rows."""
    mean = rows.mean(-1)
    return np.divide(rows.max(-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def trace_file(path: Path) -> Path:
    """The trace of a run directory; `path` itself if it is no folder."""
    return path / TRACE_FILE if path.is_dir() else path


def read_trace(path: Path, first: int = 0, last: int | None = None) -> Trace:
    """Reads the records of the steps from `first` to `last`, both included.

    Args:
        path: a run directory, or a routing_trace.jsonl.
        first, last: steps; None: to the end.

    Raises TraceError if there is no such trace, no record in this range, or a record is damaged.
    """
    steps, rows = [], []
    for record in read_records(path, first, last):
        steps.append(record.step)
        rows.append(record.rows_ME)
    return Trace(np.array(steps, dtype=np.int64), record.blocks, np.stack(rows))


def read_records(path: Path, first: int = 0, last: int | None = None) -> Iterator[TraceRecord]:
    """Yields the records of `read_trace` one by one, at least one; with the same arguments and errors.

    A last line without its end is left out: a run may be writing it, and the next start removes it.
    """
    file, previous = trace_file(path), None
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = decode(line)
                    if previous and (record.blocks, record.rows_ME.shape) != (previous.blocks, previous.rows_ME.shape):
                        raise ValueError("it has other layers or experts than the records before it")
                    if previous and record.step <= previous.step:
                        raise ValueError(f"its step {record.step} does not follow step {previous.step}")
                except ValueError as error:
                    raise TraceError(
                        f"{file}, line {number}: is damaged: {error}; remove the line, or restore the file"
                    ) from error
                if last is not None and record.step > last:
                    break
                previous = record
                if record.step >= first:
                    yield record
    except OSError as error:
        reason = error.strerror or str(error)
        raise TraceError(
            f"{file}: cannot be read ({reason}); a run with train.routing_trace_every=10 writes this file"
        ) from error
    if previous is None or previous.step < first:
        span = f"from step {first}" + ("" if last is None else f" to {last}")
        raise TraceError(
            f"{file}: has no record {span}; train.routing_trace_every sets the steps that a run records, give others"
        )


def encode(record: TraceRecord) -> bytes:
    """The line of a record, with its end."""
    values: dict[str, Any] = {"step": record.step, "ep": record.ep, "group": record.group, "blocks": record.blocks}
    values |= {"shape": record.rows_RME.shape}
    values["owners"] = None if record.owner_ME is None else packed(record.owner_ME, "<u2")
    return checked_line(values | {"rows": packed(record.rows_RME, "<u4")})


def decode(line: bytes) -> TraceRecord:
    """The record of a line. Raises ValueError with the reason, a clause, if the line is damaged."""
    step, ep, group, blocks, shape, owners, rows = checked_values(line, _KEYS)
    are_texts = isinstance(rows, str) and isinstance(owners, str | None)
    if not are_naturals([step, ep, group], blocks, shape) or not are_texts:
        raise ValueError("its numbers are not natural numbers")
    R, M, E = shape if len(shape) == 3 else (0, 0, 0)
    if not R or not M or not 0 < ep <= E or not group or R % group or len(blocks) != M:
        raise ValueError("its sizes do not fit each other")
    owner_ME = None if owners is None else unpacked(owners, "<u2", (M, E)).astype(np.int64)
    if owner_ME is not None and owner_ME.max() >= ep:
        raise ValueError(f"it has an expert on rank {owner_ME.max()} of {ep}")
    return TraceRecord(step, tuple(blocks), unpacked(rows, "<u4", shape).astype(np.int64), ep, group, owner_ME)


# ---- lines with a checksum, which `recorded_routes.py` also has


def checked_line(values: Mapping[str, Any]) -> bytes:
    """A line of JSON with its end, whose last value is the checksum of all before."""
    checked = json.dumps(values)[:-1].encode()
    return checked + b', "crc32": "%08x"}\n' % zlib.crc32(checked)


def checked_values(line: bytes, keys: Sequence[str]) -> list[Any]:
    """The values of a `checked_line`, in order. Raises ValueError if it is damaged or has other keys."""
    match = _LINE.fullmatch(line.rstrip(b"\n"))
    if match is None:
        raise ValueError("it is no record with a checksum")
    if zlib.crc32(match[1]) != int(match[2], 16):
        raise ValueError("its checksum differs")
    values = json.loads(match[1] + b"}")
    if list(values) != list(keys):
        raise ValueError(f"it has the keys {', '.join(values)}, not {', '.join(keys)}")
    return list(values.values())


def are_naturals(*lists: Any) -> bool:
    """Whether all arguments are lists of integers from 0."""
    return all(
        isinstance(values, list) and all(type(value) is int and value >= 0 for value in values) for values in lists
    )


def packed(numbers: np.ndarray, dtype: str) -> str:
    """Whole numbers as text: compressed, first the lowest byte of all of them, since most high bytes are zero."""
    as_bytes = np.ascontiguousarray(numbers, dtype=dtype).reshape(-1, 1).view(np.uint8)
    return base64.b64encode(zlib.compress(as_bytes.T.tobytes())).decode()


def unpacked(text: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """The numbers of `packed`. Raises ValueError if they cannot be read or their number is not that of the shape."""
    width, count = np.dtype(dtype).itemsize, math.prod(shape)
    if count > _MAX_NUMBERS:
        raise ValueError("its sizes do not fit each other")
    try:
        inflater = zlib.decompressobj()
        planes = inflater.decompress(base64.b64decode(text, validate=True), width * count + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"its numbers cannot be read ({error})") from error
    if len(planes) != width * count or not inflater.eof:
        raise ValueError("its number of numbers is wrong")
    return np.frombuffer(planes, dtype=np.uint8).reshape(width, -1).T.copy().view(dtype).reshape(shape)
