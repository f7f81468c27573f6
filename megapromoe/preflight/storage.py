"""The run directory and the data, as each node sees them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megapromoe.config.options import UNSET, Config
from megapromoe.data.sources import open_dataset
from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.io import staging_path, write_bytes
from megapromoe.planning.machines import GIB
from megapromoe.preflight.verdict import FAIL, PASS, SKIP, WARN, Cluster, Limits, Row, culprits, disagreements

PROBE = 32 * 2**20  # bytes that each node writes
VISIBLE = 60.0  # seconds that a file system may take to show a file: NFS caches folders for half a minute
RECORDS = 64


@dataclass(frozen=True)
class Files:
    """What a node finds in the run directory.

    Attributes:
        error: why it could not write; "" if it could.
        seen: node that wrote -> seconds until its file was seen with its content; negative: not in time.
        write: bytes per second of its own write with fsync and rename, while all nodes write.
        free: bytes.
    """

    folder: str
    error: str = ""
    seen: dict[str, float] = field(default_factory=dict)
    write: float = 0.0
    free: int = 0


@dataclass(frozen=True)
class Data:
    """What a node reads: number of records, a hash over some spread over the set, records per second; or the error."""

    error: str = ""
    records: int = 0
    digest: str = ""
    speed: float = 0.0


def try_files(folder: Path, channel: StoreChannel, leaders: dict[str, int], node: str) -> Files | None:
    """Each node's first rank writes a file and looks for those of its neighbour and of rank 0. All ranks call it.

    The files lie in `folder`/preflight and are removed at the end, or by the next preflight.
    """
    if channel.rank not in leaders.values():
        return None
    folder = folder.absolute() / "preflight"
    names = list(leaders)
    own, before, first = names.index(node), names[names.index(node) - 1], names[0]
    content = hashlib.sha256(f"{os.urandom(16).hex()} {node}".encode()).digest() * (PROBE // 32)
    error, speed, free = "", 0.0, 0
    mine = folder / f"probe-{own}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        start = time.perf_counter()
        write_bytes(mine, content)
        speed = PROBE / (time.perf_counter() - start)
    except OSError as problem:
        error = f"{problem.filename or folder}: {problem.strerror or problem}"
    channel.send(f"file/{own}", None if error else hashlib.sha256(content).hexdigest())
    seen = {}
    for other in dict.fromkeys((before, first)):
        digest = channel.receive(f"file/{names.index(other)}")
        if digest is not None:  # else that node's own error says enough
            seen[other] = _seen_after(folder / f"probe-{names.index(other)}", digest)
    channel.barrier("files read", len(leaders))
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
        staging_path(mine).unlink(missing_ok=True)
    channel.barrier("files removed", len(leaders))
    with contextlib.suppress(OSError):  # the last node finds it empty; a report in it keeps it
        folder.rmdir()
    return Files(str(folder.parent), error, seen, speed, free)


def _seen_after(file: Path, digest: str) -> float:
    """Seconds until the file is there with this content; -1.0 if that takes longer than `VISIBLE`."""
    start = time.perf_counter()
    while time.perf_counter() - start < VISIBLE:
        with contextlib.suppress(OSError):
            if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
                return time.perf_counter() - start
        time.sleep(0.05)
    return -1.0


def try_data(config: Config) -> Data | None:
    """Opens the data set and reads records spread over it; None if none is chosen."""
    if config.data.source == UNSET:
        return None
    try:
        dataset = open_dataset(config)
        indices = np.unique(np.linspace(0, len(dataset) - 1, RECORDS).astype(np.int64))
        start = time.perf_counter()
        images = dataset.draw(indices, np.zeros(len(indices), dtype=bool), None)
        seconds = time.perf_counter() - start
        labels = np.asarray(dataset.labels)[indices]
    except Exception as error:  # whatever a reader of files raises: that this node cannot read is the finding
        return Data(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    content = np.ascontiguousarray(images).tobytes() + np.ascontiguousarray(labels).tobytes()
    return Data("", len(dataset), hashlib.sha256(content).hexdigest()[:16], len(indices) / max(seconds, 1e-9))


# ---- rules


def judge_files(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """The run directory is one place, all nodes write there and see what others wrote, and checkpoints fit."""
    found: dict[str, Files] = {cluster.node_of[r]: files for r, files in cluster.found.get("files", {}).items()}
    if "files" not in cluster.found:
        return
    if not found:
        yield Row("files", (), "not tried", "", SKIP, "give --run to try the run directory")
        return
    nodes = tuple(found)
    rows: list[Row] = []
    failed = {node: files.error for node, files in found.items() if files.error}
    common = len(failed) == len(found)  # then the path is to blame
    for node, error in failed.items():
        remedy = "choose a folder that can be written" if common else "is it mounted there, and writable?"
        rows.append(Row("files", (node,), error, "writable", FAIL, remedy, () if common else (node,), setup=common))
    tried = [(reader, other) for reader, files in found.items() for other in files.seen if reader != other]
    unseen = [(reader, other) for reader, other in tried if found[reader].seen[other] < 0]
    if unseen:
        blame = culprits(unseen, nodes) if len(unseen) < len(tried) else ()
        said = "; ".join(f"{reader} does not see what {other} wrote" for reader, other in unseen[:4])
        remedy = "see the mounts of these nodes" if blame else "choose a run directory on a shared file system"
        rows.append(
            Row("files", blame or nodes, said, f"seen within {VISIBLE:g} s", FAIL, remedy, blame, setup=not blame)
        )
    for node, files in found.items():
        if (late := max(files.seen.values(), default=0.0)) > limits.seen_after:
            remedy = "expect slow starts: the file system caches folders"
            rows.append(Row("files", (node,), f"seen after {late:.1f} s", f"{limits.seen_after:g} s", WARN, remedy))
    written = {node: files.free for node, files in found.items() if not files.error}
    limit = f"{limits.free_bytes / GIB:.3g} GiB"
    short = tuple(node for node, free in written.items() if free < limits.free_bytes)
    if short:
        said = f"{min(written[node] for node in short) / GIB:.1f} GiB free"
        remedy = "make room, lower train.keep, save fewer snapshots (train.snapshot_every), or choose another --run"
        # On a shared file system all nodes lack the same room; if some have it, theirs is another one.
        blame = () if len(short) == len(written) else short
        rows.append(Row("free space", short, said, limit, FAIL, remedy, blame, setup=not blame))
    elif written:
        rows.append(Row("free space", tuple(written), f"{min(written.values()) / GIB:.1f} GiB free", limit, PASS))
    yield from rows
    if not any(row.check == "files" and row.verdict == FAIL for row in rows):
        late = max((after for files in found.values() for after in files.seen.values()), default=0.0)
        slowest = min(files.write for files in found.values())
        told = f"{sum(f.write for f in found.values()) / 1e9:.2f} GB/s together, {slowest / 1e9:.2f} the slowest"
        yield Row("files", nodes, f"written and renamed, {told}; seen after {late:.2f} s", f"{VISIBLE:g} s", PASS)


def judge_data(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every node reads the same records."""
    found: dict[str, Data] = {cluster.node_of[r]: data for r, data in cluster.found.get("data", {}).items()}
    if "data" not in cluster.found:
        return
    if not found:
        yield Row("data", (), "not tried", "", SKIP, "give data.source, which training needs, to try reading")
        return
    failed = {node: data.error for node, data in found.items() if data.error}
    common = len(failed) == len(found)
    for node, error in failed.items():
        remedy = "correct the data's path or settings" if common else "is the data's file system mounted there?"
        yield Row("data", (node,), error, "readable", FAIL, remedy, () if common else (node,), setup=common)
    values = {node: (data.records, data.digest) for node, data in found.items() if not data.error}
    apart = list(
        disagreements(
            "data",
            values,
            lambda v: f"{v[0]:,} records, hash {v[1]}",
            "copy the data again, or read it from one shared place; if it is drawn, compare CPUs and numpy",
        )
    )
    yield from apart
    if not failed and not apart:
        slowest = min(data.speed for data in found.values())
        (records, digest), *_ = values.values()
        told = f"{records:,} records, hash {digest}, at least {slowest:,.0f} records/s"
        yield Row("data", tuple(values), told, "equal", PASS)
