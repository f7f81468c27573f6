"""A job that writes shards of records into one folder, on any number of ranks.

Shard k holds the records of the items [k * n, (k + 1) * n) of the source, n = `shard_size`; the ranks take shards in
turn. So the output has the same bytes for any number of ranks, and a job that was killed resumes with its first
unfinished shard. The ranks communicate through files in the folder only: each writes `part-K.json` next to its shard K;
when all exist, rank 0 writes the index and finally the manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megapromoe.distributed import watchdog
from megapromoe.errors import UserError
from megapromoe.io import SUFFIX, sha256_of_json, write_json

logger = logging.getLogger(__name__)

PLAN = "plan.json"
PART_HASH = "part_sha256"  # key of a part: the hash of its other keys; earlier versions did not write it
SHARD_SIZE = 32768  # items; 1.07 GB for latents of the SD-VAE at 256 x 256
POLL = 0.5  # seconds between checks for the parts of other ranks


class EncodeError(UserError):
    """Latents or text features cannot be written, or would mix with other data."""


class ShardJob(ABC):
    """What a job writes.

    Args:
        folder: of the output; shared by all ranks.
        num_items: number of items of the source.
        shard_size: items of a shard.
    """

    inputs: str
    """What the items are, in messages: "images" or "captions"."""
    manifest_file: str
    part_keys: frozenset[str]
    """Keys of the result of `write_shard`."""

    def __init__(self, folder: Path, num_items: int, shard_size: int):
        self.folder, self.num_items, self.shard_size = Path(folder), num_items, shard_size
        self.shards = math.ceil(num_items / shard_size)

    def items_of_shard(self, number: int) -> range:
        """Numbers of the items of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.num_items))

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """The description of the job as JSON: two jobs with equal plans write equal files."""

    @abstractmethod
    def shard_name(self, number: int) -> str:
        """The file name of a shard."""

    @abstractmethod
    def write_shard(self, number: int, progress: Callable[[int], Any]) -> dict[str, Any]:
        """Writes a shard and returns what `merge` needs to know of it, with the keys `part_keys`."""

    @abstractmethod
    def merge(self, parts: list[dict[str, Any]]) -> None:
        """Writes the index and then the manifest from the results of `write_shard`."""


def run_job(
    job: ShardJob,
    rank: int = 0,
    world: int = 1,
    wait_timeout: float = 3600.0,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes all shards, or those that an interrupted job has left; rank 0 then writes the index and the manifest.

    All ranks call it.

    Args:
        rank, world: this rank and the number of ranks.
        wait_timeout: seconds without a newly finished shard after which rank 0 stops waiting for other ranks.
        progress: called with the number of newly finished items: on rank 0 of all ranks, elsewhere of this rank.

    Raises:
        EncodeError: the folder holds other files or the output of another job, or a rank is missing; and what the job
            raises.
    """
    folder, progress = job.folder, progress or (lambda _: None)
    with _exclusive_folder(job, rank, world, wait_timeout) as done:
        if done:
            progress(job.num_items)
            return
        progress_of_job = _JobProgress(job, progress if rank == 0 else None)
        for number in range(rank, job.shards, world):
            watchdog.at(f"shard {number + 1} of {job.shards} of {folder}")
            if _read_part(job, number) is None:
                part = job.write_shard(number, progress_of_job.add_own if rank == 0 else progress)
                # The part file marks the shard as finished.
                write_json(folder / _part_name(number), part | {PART_HASH: sha256_of_json(part)})
                logger.info("%s: shard %d of %d", folder, number + 1, job.shards)
            elif rank:
                progress(len(job.items_of_shard(number)))
            progress_of_job.add_finished_shards()
        if rank:
            return
        watchdog.at(f"waiting for the other ranks' shards of {folder}")
        _wait_for_shards(job, wait_timeout, progress_of_job)
        watchdog.at(f"writing the index of {folder}")
        _merge(job)


def discard(job: ShardJob) -> None:
    """Removes the shards, their parts and the plan, so that the next attempt reads the source again."""
    for number in range(job.shards):
        (job.folder / _part_name(number)).unlink()
        (job.folder / job.shard_name(number)).unlink()
    (job.folder / PLAN).unlink(missing_ok=True)


def _merge(job: ShardJob) -> None:
    """Writes the index and the manifest from the part files, and then removes these."""
    parts = []
    for number in range(job.shards):
        part = _read_part(job, number)
        if part is None:
            raise EncodeError(
                f"{job.folder / job.shard_name(number)} or its part file is missing or damaged; repeat the command"
            )
        parts.append(part)
    job.merge(parts)
    for number in range(job.shards):
        (job.folder / _part_name(number)).unlink()
    for unfinished in job.folder.glob(f"*{SUFFIX}"):
        unfinished.unlink()


@contextlib.contextmanager
def _exclusive_folder(job: ShardJob, rank: int, world: int, wait_timeout: float) -> Iterator[bool]:
    """Gives this job exclusive access to its folder; yields whether its data are complete already.

    Rank 0 writes the plan and holds a lock on it; the other ranks wait for the plan and compare it with theirs. A job
    of one rank that fails before its first shard is finished removes the plan. With several ranks the plan is kept,
    because others may still be writing.
    """
    folder, plan = job.folder, job.plan()
    path = folder / PLAN
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(not path.name.endswith(SUFFIX) for path in folder.iterdir()):
                raise EncodeError(f"{folder} holds other files; give an empty or a new folder")
            write_json(path, plan, indent=1)
    deadline = time.monotonic() + wait_timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise EncodeError(
                f"{path}: rank 0 has not written it within {wait_timeout:g} s; start all ranks on one shared folder"
            )
        time.sleep(POLL)
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise EncodeError(f"{path} is damaged: {error}; take it from a copy, or encode into a new folder") from error
    if different := sorted(key for key in before.keys() | plan.keys() if before.get(key) != plan.get(key)):
        changes = ", ".join(f"{key} was {_short(before.get(key))}, is {_short(plan.get(key))}" for key in different)
        unused = ", or remove this one, in which no shard is finished" if _is_unused(job) else ""
        raise EncodeError(
            f"{folder} was started with other settings or {job.inputs}: {changes}; repeat the first command, or give"
            f" another folder{unused}"
        )
    with open(path) as file:
        if rank == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EncodeError(f"{folder}: another job is writing to it; wait for that job, or stop it") from error
        try:
            yield (folder / job.manifest_file).exists()
        except Exception:
            if world == 1 and _is_unused(job):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def _is_unused(job: ShardJob) -> bool:
    """Whether no job has finished a shard in the folder."""
    return not (job.folder / job.manifest_file).exists() and not any(job.folder.glob("part-*.json"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _read_part(job: ShardJob, number: int) -> dict[str, Any] | None:
    """The part file of a finished shard; None if the shard is not finished, or, with a warning, if it is damaged."""
    path = job.folder / _part_name(number)
    if not (job.folder / job.shard_name(number)).exists() or not path.exists():
        return None
    try:
        part = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        part = None
    if isinstance(part, dict):
        digest = part.pop(PART_HASH, None)
        if part.keys() == job.part_keys and digest in (None, sha256_of_json(part)):
            return part
    logger.warning("%s is damaged; its shard is written again", path)
    return None


class _JobProgress:
    """Reports every file of the job once to rank 0's `progress`, no matter which rank has encoded it."""

    def __init__(self, job: ShardJob, progress: Callable[[int], Any] | None):
        self.folder, self.progress, self.unfinished = job.folder, progress, set(range(job.shards))
        self.sizes = [len(job.items_of_shard(number)) for number in range(job.shards)]
        self.own_current = 0  # reported files of this rank's current shard

    def add_own(self, count: int) -> None:
        """Reports `count` files of this rank."""
        self.own_current += count
        if self.progress is not None:
            self.progress(count)

    def add_finished_shards(self) -> None:
        """Reports the files of newly finished shards that have not been reported yet."""
        if self.progress is None:
            return
        for number in sorted(k for k in self.unfinished if (self.folder / _part_name(k)).exists()):
            self.unfinished.discard(number)
            reported = min(self.own_current, self.sizes[number])
            self.own_current -= reported
            self.progress(self.sizes[number] - reported)


def _wait_for_shards(job: ShardJob, wait_timeout: float, progress_of_job: _JobProgress) -> None:
    """Waits until every shard is finished. Raises EncodeError after `wait_timeout` seconds without a new one."""
    folder, remaining, since = job.folder, job.shards, time.monotonic()
    while missing := [number for number in range(job.shards) if not (folder / _part_name(number)).exists()]:
        progress_of_job.add_finished_shards()
        if len(missing) < remaining:
            remaining, since = len(missing), time.monotonic()
        if time.monotonic() - since > wait_timeout:
            raise EncodeError(
                f"{folder}: no shard was finished within {wait_timeout:g} s, {len(missing)} shards are missing, the"
                f" first {job.shard_name(missing[0])}; another rank may have ended: repeat the command"
            )
        time.sleep(POLL)
    progress_of_job.add_finished_shards()
