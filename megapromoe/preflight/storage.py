"""Checks of the run directory and of the data set on each node."""

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
import torch

from megapromoe.config.data_options import UNSET
from megapromoe.config.options import Config
from megapromoe.data.sources import open_captions, open_dataset, open_teacher_features
from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.io import staging_path, write_bytes
from megapromoe.planning.machines import GIB
from megapromoe.preflight.verdict import (
    FAIL,
    PASS,
    SKIP,
    WARN,
    Cluster,
    Limits,
    Row,
    nodes_to_blame,
    rows_of_differences,
)

PROBE = 32 * 2**20  # bytes that each node writes
VISIBLE = 60.0  # seconds until a written file must be visible on other nodes: NFS caches folders for half a minute
RECORDS = 64  # records that each node reads


@dataclass(frozen=True)
class Files:
    """The findings of one node about the run directory.

    Attributes:
        folder: path of the run directory.
        error: why this node could not write; "" if it could.
        visible_after: other node -> seconds until its file was visible on this one with its content; negative: not
            within `VISIBLE` seconds.
        write: bytes per second of this node's write with fsync and rename, while all nodes write.
        free: bytes free.
    """

    folder: str
    error: str = ""
    visible_after: dict[str, float] = field(default_factory=dict)
    write: float = 0.0
    free: int = 0


@dataclass(frozen=True)
class Data:
    """The findings of one node about the data set.

    Attributes:
        error: why the data set could not be read; "" if it could.
        records: number of records.
        digest: hash over `RECORDS` records spread over the data set, and their captions.
        speed: records read per second.
    """

    error: str = ""
    records: int = 0
    digest: str = ""
    speed: float = 0.0


def check_files(folder: Path, channel: StoreChannel, leaders: dict[str, int], node: str) -> Files | None:
    """Checks that files written on one node are visible on others. Collective; None except on the first rank of a node.

    The first rank of each node writes a file, then reads the files of the preceding node and of rank 0's node. The
    files are in `folder`/preflight and are removed at the end, or by the next preflight.
    """
    if channel.rank not in leaders.values():
        return None
    folder = folder.absolute() / "preflight"
    names = list(leaders)
    index, preceding, first = names.index(node), names[names.index(node) - 1], names[0]
    content = hashlib.sha256(f"{os.urandom(16).hex()} {node}".encode()).digest() * (PROBE // 32)
    error, speed, free = "", 0.0, 0
    probe = folder / f"probe-{index}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        start = time.perf_counter()
        write_bytes(probe, content)
        speed = PROBE / (time.perf_counter() - start)
    except OSError as problem:
        error = f"{problem.filename or folder}: {problem.strerror or problem}"
    channel.send(f"file/{index}", None if error else hashlib.sha256(content).hexdigest())
    visible_after = {}
    for other in dict.fromkeys((preceding, first)):
        digest = channel.receive(f"file/{names.index(other)}")
        if digest is not None:  # None: that node could not write, which is in its own findings
            visible_after[other] = _seconds_until_visible(folder / f"probe-{names.index(other)}", digest)
    channel.barrier("files read", len(leaders))
    with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
        staging_path(probe).unlink(missing_ok=True)
    channel.barrier("files removed", len(leaders))
    with contextlib.suppress(OSError):  # fails if another node removed it, or if it holds a report
        folder.rmdir()
    return Files(str(folder.parent), error, visible_after, speed, free)


def _seconds_until_visible(file: Path, digest: str) -> float:
    """Seconds until the file exists with this content; -1.0 if that takes longer than `VISIBLE`."""
    start = time.perf_counter()
    while time.perf_counter() - start < VISIBLE:
        with contextlib.suppress(OSError):
            if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
                return time.perf_counter() - start
        time.sleep(0.05)
    return -1.0


def check_data(config: Config) -> Data | None:
    """Opens the data set and reads `RECORDS` records spread over it, with their captions if the model needs texts.

    None if the config names no data set.
    """
    if config.data.source == UNSET:
        return None
    try:
        dataset = open_dataset(config)
        captions, teacher = open_captions(config, dataset), open_teacher_features(config, dataset)
        indices = np.unique(np.linspace(0, len(dataset) - 1, RECORDS).astype(np.int64))
        start = time.perf_counter()
        images = dataset.sample(indices, np.zeros(len(indices), dtype=bool), None)
        texts = captions.batch(indices, np.zeros(len(indices), dtype=bool)) if captions is not None else None
        features_of_teacher = teacher.sample(indices, np.zeros(len(indices), dtype=bool), None) if teacher else None
        seconds = time.perf_counter() - start
        labels = np.asarray(dataset.labels)[indices]
    except Exception as error:  # any error of a reader is a finding about this node
        return Data(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    content = np.ascontiguousarray(images).tobytes() + np.ascontiguousarray(labels).tobytes()
    if features_of_teacher is not None:
        content += np.ascontiguousarray(features_of_teacher).tobytes()
    if texts is not None:
        features = texts.features_BND.view(torch.int16)  # numpy has no bfloat16
        content += features.numpy().tobytes() + texts.mask_BN.numpy().tobytes()
    return Data("", len(dataset), hashlib.sha256(content).hexdigest()[:16], len(indices) / max(seconds, 1e-9))


# ---- rules


def evaluate_files(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """All nodes must write to the same run directory and see each other's files, and the checkpoints must fit."""
    if "files" not in cluster.findings:
        return
    files_of = {cluster.node_of[rank]: files for rank, files in cluster.findings["files"].items()}
    if not files_of:
        yield Row("files", (), "not checked", "", SKIP, "give --run-dir to check the run directory")
        return
    nodes = tuple(files_of)
    rows: list[Row] = []
    failed = {node: files.error for node, files in files_of.items() if files.error}
    on_all_nodes = len(failed) == len(files_of)  # then the path is wrong, and not a node
    for node, error in failed.items():
        if on_all_nodes:
            rows.append(
                Row("files", (node,), error, "writable", FAIL, "choose a folder that can be written", setup=True)
            )
        else:
            remedy = "check that it is mounted and writable on this node"
            rows.append(Row("files", (node,), error, "writable", FAIL, remedy, (node,)))
    pairs = [(reader, other) for reader, files in files_of.items() for other in files.visible_after if reader != other]
    missing = [(reader, other) for reader, other in pairs if files_of[reader].visible_after[other] < 0]
    if missing:
        blame = nodes_to_blame(missing, nodes) if len(missing) < len(pairs) else ()
        result = "; ".join(f"{reader} does not see what {other} wrote" for reader, other in missing[:4])
        remedy = "check the mounts of these nodes" if blame else "choose a run directory on a shared file system"
        limit = f"visible within {VISIBLE:g} s"
        rows.append(Row("files", blame or nodes, result, limit, FAIL, remedy, blame, setup=not blame))
    for node, files in files_of.items():
        if (delay := max(files.visible_after.values(), default=0.0)) > limits.visible_within:
            remedy = "the file system caches folders: expect slow starts"
            limit = f"{limits.visible_within:g} s"
            rows.append(Row("files", (node,), f"visible after {delay:.1f} s", limit, WARN, remedy))
    written = {node: files.free for node, files in files_of.items() if not files.error}
    limit = f"{limits.free_bytes / GIB:.3g} GiB"
    short = tuple(node for node, free in written.items() if free < limits.free_bytes)
    if short:
        result = f"{min(written[node] for node in short) / GIB:.1f} GiB free"
        remedy = (
            "free space, lower train.keep_last, save fewer snapshots (train.snapshot_every), or choose another"
            " --run-dir"
        )
        # A shared file system is full on all nodes. If only some nodes lack space, these use another file system.
        blame = () if len(short) == len(written) else short
        rows.append(Row("free space", short, result, limit, FAIL, remedy, blame, setup=not blame))
    elif written:
        rows.append(Row("free space", tuple(written), f"{min(written.values()) / GIB:.1f} GiB free", limit, PASS))
    yield from rows
    if not any(row.check == "files" and row.verdict == FAIL for row in rows):
        delay = max((seconds for files in files_of.values() for seconds in files.visible_after.values()), default=0.0)
        slowest = min(files.write for files in files_of.values())
        speeds = f"{sum(f.write for f in files_of.values()) / 1e9:.2f} GB/s together, {slowest / 1e9:.2f} the slowest"
        yield Row("files", nodes, f"written and renamed, {speeds}; visible after {delay:.2f} s", f"{VISIBLE:g} s", PASS)


def evaluate_data(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every node must read the same records."""
    if "data" not in cluster.findings:
        return
    data_of = {cluster.node_of[rank]: data for rank, data in cluster.findings["data"].items()}
    if not data_of:
        yield Row("data", (), "not checked", "", SKIP, "set data.source, which training needs, to check reading")
        return
    failed = {node: data.error for node, data in data_of.items() if data.error}
    on_all_nodes = len(failed) == len(data_of)
    for node, error in failed.items():
        if on_all_nodes:
            yield Row("data", (node,), error, "readable", FAIL, "correct the data.* options", setup=True)
        else:
            remedy = "check that the data's file system is mounted on this node"
            yield Row("data", (node,), error, "readable", FAIL, remedy, (node,))
    values = {node: (data.records, data.digest) for node, data in data_of.items() if not data.error}
    differences = list(
        rows_of_differences(
            "data",
            values,
            lambda v: f"{v[0]:,} records, hash {v[1]}",
            "copy the data again, or read it from one shared folder; for synthetic data compare CPUs and numpy",
        )
    )
    yield from differences
    if not failed and not differences:
        slowest = min(data.speed for data in data_of.values())
        (records, digest), *_ = values.values()
        result = f"{records:,} records, hash {digest}, at least {slowest:,.0f} records/s"
        yield Row("data", tuple(values), result, "equal", PASS)
