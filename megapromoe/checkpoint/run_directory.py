"""The run directory: the folder with all results of a run. At most one process trains in it at a time.

==================  =================================================================================
config.yaml         the resolved config of the latest start
environment.json    a list, one entry per start: versions, host, ranks, command line, git commit
metrics.jsonl       one line for each logged step
placement.yaml      the experts of each rank, as parallel.placement=auto has chosen them at the latest start
routing_trace.jsonl rows of each expert in some steps (train.routing_trace_every), see `routing_trace.py`
checkpoints/        step-XXXXXXXX/
snapshots/          average-XXXXXXXX/: averaged weights only (train.snapshot_every)
branches/           results of later steps, moved by a start that went back, see `history.py`
samples/            pictures of samples, from training and from `megapromoe sample`
tensorboard/        TensorBoard events
wandb/              files of Weights & Biases (train.wandb)
profile/            traces and memory snapshots of steps (train.profile)
logs/               output of each rank, a folder for each attempt (launchers)
diverged.txt        why the latest start ended, if its last steps were skipped; launchers do not repeat it
run.lock            locked while a process trains in the folder; contains its pid and host
==================  =================================================================================

A second start in the same folder continues the run. Settings that would make it another run are refused, see
`origin.FIXED`. A start that fails before its first step, for example because of its data, leaves the folder unchanged.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megapromoe.checkpoint.data_identity import data_identity, described_latents
from megapromoe.checkpoint.environment import describe_start
from megapromoe.checkpoint.origin import Origin, changed_settings, fixed_changes
from megapromoe.config.options import Config
from megapromoe.config.renamed_options import present_sections
from megapromoe.config.resolve import to_yaml
from megapromoe.config.schedule import describe_changes
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, UserError
from megapromoe.io import open_regular, staging_path, write_json, write_text
from megapromoe.routing_trace import TRACE_FILE

logger = logging.getLogger(__name__)

_LOCK_ATTEMPTS = 20


class RunDirectoryError(UserError):
    """A folder that cannot be used for this run: it is not a run, belongs to another run, or is not writable."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # rank 0 raises it and broadcasts it, so it is printed once


class RunInUse(RunDirectoryError):
    """A folder that another process has locked."""

    exit_code = ExitCode.FAILED  # repeating can help: that process may end


@dataclass(frozen=True)
class _Comparison:
    """A start compared with the run in its folder.

    Attributes:
        changed: settings that differ, dotted name -> [stored, new].
        data: identity of the data set, for environment.json; None if it has none or cannot be read.
        reconfigured: why the folder becomes a new run with the new config; "" if the run continues.
    """

    changed: dict[str, list[Any]]
    data: str | None
    reconfigured: str = ""


class RunDirectory:
    """The paths of a run. `RunDirectory(folder)` only reads; `claim` and `open` lock the folder for training."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.routing_trace = self.folder / TRACE_FILE
        self.checkpoints = self.folder / "checkpoints"
        self.snapshots = self.folder / "snapshots"
        self.branches = self.folder / "branches"
        self.samples = self.folder / "samples"
        self.tensorboard = self.folder / "tensorboard"
        self.diverged = self.folder / "diverged.txt"
        self.lock_file = self.folder / "run.lock"
        self.changed: dict[str, list[Any]] = {}
        """Settings that differ from those of the last start, dotted name -> [stored, new]; set by `claim`."""
        self._lock: IO[str] | None = None
        self._start: tuple[list[dict[str, Any]], Config] | None = None  # claimed, and not recorded yet
        self._made_folder = self._made_lock = False

    @classmethod
    def open(
        cls, folder: Path, config: Config, world: int, force: Iterable[str] = (), *, launcher: str = "python"
    ) -> RunDirectory:
        """`claim` followed by `record`: for a start that cannot be refused any more. Raises RunDirectoryError."""
        run = cls.claim(folder, config, world, force, launcher=launcher)
        try:
            run.record()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def claim(
        cls, folder: Path, config: Config, world: int, force: Iterable[str] = (), *, launcher: str = "python"
    ) -> RunDirectory:
        """Creates the folder if needed and locks it until `close` or the end of the process.

        The start is not written before `record`. If it fails before, `close` leaves the folder as it was, so the next
        start can have another config. If the run in the folder took no step, its config may change in any field, and it
        becomes a new run. Called on rank 0 only; other ranks read the paths from `RunDirectory(folder)`.

        Args:
            folder: the run directory.
            config: configuration of this start.
            world: ranks of the job.
            force: dotted names of `FIXED` fields that may differ from the stored config.
            launcher: name of the launcher, for environment.json.

        Raises RunDirectoryError if another process trains in the folder, if it contains something other than a run, if
        the run in it took steps and its config differs in a `FIXED` field, or if it cannot be written.
        """
        run = cls(folder)
        try:
            with run._named_errors():
                run._refuse_foreign_folder()
                run._make_and_lock()
                comparison = run._compare(config, force)
                run.changed = comparison.changed
                entries = [] if comparison.reconfigured else run._recorded_starts()
                first = {} if entries else {"run": uuid.uuid4().hex[:12]}
                described = described_latents(config)
                entry = first | describe_start(config, world, launcher, comparison.changed, comparison.data, described)
                run._start = [*entries, entry], config
                run.diverged.unlink(missing_ok=True)
        except BaseException:
            run.close()
            raise
        if comparison.reconfigured:
            logger.info("%s: %s", run.folder, comparison.reconfigured)
        return run

    def record(self, more: Mapping[str, Any] | None = None) -> None:
        """Writes the start that `claim` has prepared: config.yaml and an entry of environment.json.

        Args:
            more: further keys of the entry.

        Raises RunDirectoryError if the folder cannot be written.
        """
        assert self._start is not None, "call `claim` first"
        (*earlier, entry), config = self._start
        with self._named_errors():
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.environment, [*earlier, entry | dict(more or {})], indent=2)
            write_text(self.config_file, to_yaml(config))
        self._start = None

    def state(self, config: Config, force: Iterable[str] = (), progress: str = "continues", step: int = 0) -> str:
        """Describes what `open` would do, without changing anything. Raises RunDirectoryError where `open` would.

        Args:
            progress: where the run would begin, see `history.progress`.
            step: step of the checkpoint that it would load, 0 without one; for changes of the learning rate.
        """
        with self._named_errors():
            self._refuse_foreign_folder()
            if self.lock_file.exists():
                self._take_lock(probe=True)
                self.close()
            if not self.config_file.exists():
                return f"{self.folder}: a new run"
            comparison = self._compare(config, force)
        if comparison.reconfigured:
            return f"{self.folder}: {comparison.reconfigured}"
        listed = "".join(f"\n  {line}" for line in describe_changes(config, comparison.changed, step))
        return f"{self.folder}: {progress}" + (f"; changes{listed}" if listed else "")

    def took_steps(self) -> bool:
        """Whether there is any result of a step: a checkpoint, complete or not, a log line, a picture, a branch.

        Also true if environment.json is missing: then the folder may be something else, and must not be overwritten.
        """
        if not self.environment.is_file():
            return True
        if os.path.lexists(self.metrics) and not (self.metrics.is_file() and self.metrics.stat().st_size == 0):
            return True
        kept = (self.checkpoints, self.snapshots, self.samples, self.branches)
        return any(any(folder.glob("*")) for folder in kept)

    def recorded_latents(self) -> dict[str, Any] | None:
        """Autoencoder, scale and shift of the latents of the latest start that recorded them; None without one."""
        with contextlib.suppress(OSError, RunDirectoryError):
            return next((e["latents"] for e in reversed(self._recorded_starts()) if e.get("latents")), None)
        return None

    def owner(self) -> str | None:
        """The process that trains in the folder now, such as "pid 17 on node3", from run.lock; None without one."""
        try:
            self._take_lock(probe=True)
        except FileNotFoundError:
            return None
        except RunDirectoryError:
            return self.lock_file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        self.close()
        return None

    def close(self) -> None:
        """Unlocks the folder. If the start was not recorded, removes the lock file and the folder that it created."""
        if self._lock is None:
            return
        if self._made_lock and not self.config_file.exists():
            with contextlib.suppress(OSError):
                self.lock_file.unlink()  # while it is locked: `_make_and_lock` of another process notices
                if self._made_folder:
                    self.folder.rmdir()  # fails if it is not empty: it may contain a launcher's logs
        self._lock.close()
        self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Raises an OSError of the block as RunDirectoryError, with the file and a remedy."""
        try:
            yield
        except OSError as error:
            where, reason = error.filename or self.folder, error.strerror or error
            raise RunDirectoryError(
                f"{where}: {reason}; a run needs to read and write this folder: correct that,"
                " or choose another --run-dir"
            ) from error

    def _refuse_foreign_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunDirectoryError(f"{self.folder}: is a file; a run needs a folder, choose another --run-dir")
        if not self.folder.is_dir() or self.config_file.exists():
            return
        # A start that was killed early leaves these files; a launcher creates its logs before the run starts.
        expected = {self.lock_file.name, *(p.name for p in (self.checkpoints, self.samples, self.tensorboard))}
        expected |= {"logs", "preflight", "flight_records"}
        expected |= {self.environment.name, *(staging_path(p).name for p in (self.environment, self.config_file))}
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in expected)
        if others or any(self.checkpoints.glob("*")):
            content = ", ".join(others[:3]) or self.checkpoints.name
            rule = f"is not empty (holds {content}) and has no config.yaml, so it is no run"
            raise RunDirectoryError(f"{self.folder}: {rule}; choose another --run-dir, or an empty folder")

    def _make_and_lock(self) -> None:
        """Creates the folder if needed and locks it; repeats this if a failed start removed the folder meanwhile."""
        for _ in range(_LOCK_ATTEMPTS):
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made_lock = not os.path.lexists(self.lock_file)
            try:
                self._take_lock()
            except FileNotFoundError:
                if self.folder.exists():
                    raise
                continue
            assert self._lock is not None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.lock_file)):
                    return
            self._lock.close()
            self._lock = None
        raise RunInUse(
            f"{self.folder}: other starts create and remove it repeatedly; try again, or choose another --run-dir"
        )

    def _take_lock(self, probe: bool = False) -> None:
        """Locks run.lock. The operating system releases the lock when this process ends, also if it is killed.

        Args:
            probe: only test whether it can be locked, and write nothing.

        Raises RunInUse if another process has locked it.
        """
        file = open_regular(self.lock_file, os.O_RDONLY if probe else os.O_RDWR | os.O_CREAT)
        lock = open(file, "r" if probe else "r+", encoding="utf-8", errors="replace")  # noqa: SIM115, open until `close`
        try:
            fcntl.flock(lock, fcntl.LOCK_NB | (fcntl.LOCK_SH if probe else fcntl.LOCK_EX))
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            remedy = "wait for it or stop it, or choose another --run-dir"
            raise RunInUse(f"{self.folder}: in use by a live run ({owner}); {remedy}") from error
        except OSError as error:  # some cluster file systems are mounted without locks
            logger.warning(
                "%s: this file system has no locks (%s); make sure that only one run uses the folder",
                self.lock_file,
                error.strerror,
            )
        if not probe:
            lock.seek(0)
            lock.truncate()
            lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        self._lock = lock

    def _compare(self, config: Config, force: Iterable[str]) -> _Comparison:
        """Compares a start with the run in the folder. Raises RunDirectoryError if the start must be refused."""
        changed, forced = self._changed_settings(config), set(force)
        before = next((e["data"] for e in reversed(self._recorded_starts()) if e.get("data")), None)
        now = data_identity(config)
        fixed = fixed_changes(changed, forced)
        other_data = before is not None and now is not None and now != before and "data" not in forced
        if not fixed and not other_data:
            return _Comparison(changed, now or before)
        if not self.took_steps():
            what = ", ".join(fixed) or "the data"
            return _Comparison(
                {}, now, f"its run took no step and becomes a new run with the new config (different: {what})"
            )
        if fixed:
            listed = "".join(f"\n  - {key}: the run has {changed[key][0]!r}, not {changed[key][1]!r}" for key in fixed)
            raise RunDirectoryError(
                f"{self.config_file}: this folder belongs to a run with another config; "
                f"choose another --run-dir, or restore these fields:{listed}"
            )
        assert before is not None and now is not None
        raise RunDirectoryError(
            f"data.path = {config.data.path!r}: holds other data than this run was trained on (SHA-256 of its"
            f" manifest {now[:12]}, the run's {before[:12]}); give the path of the run's data, or continue with the"
            " new data by --allow data"
        )

    def warmup(self) -> int | None:
        """`train.warmup` of the run in the folder if it took steps, else None; None also if it cannot be read."""
        try:
            stored = self.stored_settings() if self.took_steps() else None
        except (RunDirectoryError, OSError):
            return None  # opening the folder raises the reason
        warmup = (stored or {}).get("train", {}).get("warmup")
        return warmup if type(warmup) is int else None

    def _changed_settings(self, config: Config) -> dict[str, list[Any]]:
        """Fields that differ from the stored config, name -> [stored, new]. Raises RunDirectoryError."""
        stored = self.stored_settings()
        return {} if stored is None else changed_settings(stored, config)

    def stored_settings(self) -> dict[str, dict[str, Any]] | None:
        """The sections of config.yaml, by present option names; None if there is no such file.

        Raises RunDirectoryError if it is damaged.
        """
        if not self.config_file.exists():
            return None
        try:
            stored = read_yaml(self.config_file)
        except UnreadableFile as error:
            raise RunDirectoryError(f"{self.config_file}: is damaged ({error})") from error
        if not isinstance(stored, dict) or not all(isinstance(section, dict) for section in stored.values()):
            raise RunDirectoryError(f"{self.config_file}: is damaged; it must be a mapping of sections")
        return present_sections(stored)

    def origin(self, config: Config) -> Origin:
        """What a checkpoint must share with this run to be resumed from. Call it after `claim`."""
        return Origin(self.identity(), self._starts_and_current()[-1].get("data"), config)

    def identity(self) -> str:
        """A unique name of the run, the same at every start; for manifests."""
        first = self._starts_and_current()[0]
        if "run" in first:
            return str(first["run"])
        # Earlier versions used the hash of the first entry.
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]

    def _starts_and_current(self) -> list[dict[str, Any]]:
        """The entries of environment.json, with that of the current start even if it is not recorded yet."""
        return self._recorded_starts() if self._start is None else self._start[0]

    def _recorded_starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json, empty without the file. Raises RunDirectoryError if it is damaged."""
        remedy = "move it away, and continue with --allow run, since it contained the identity of the run"
        try:
            entries = json.loads(self.environment.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(f"{self.environment}: is damaged ({error}); {remedy}") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RunDirectoryError(f"{self.environment}: is damaged (must be a list); {remedy}")
        return entries
