"""The run directory: all that a run leaves behind, in one folder that explains itself and has one owner.

==================  =================================================================================
config.yaml         the resolved config of the latest start
environment.json    a list, one entry per start: versions, host, ranks, command line, git commit
metrics.jsonl       one line per logged step
checkpoints/        step-XXXXXXXX/
snapshots/          average-XXXXXXXX/: averaged weights alone (train.snapshot_every)
branches/           what a start that went back left behind, see `history.py`
samples/            pictures drawn while training, and by `megapromoe sample`
tensorboard/        events
logs/               what each rank said, a folder for each attempt (launchers)
diverged.txt        why the latest start ended, if its last steps were skipped; launchers do not repeat it
run.lock            locked by the run that lives; its text says who
==================  =================================================================================

A second start in the same folder continues the run. What would make it another run is refused; see `origin.FIXED`.
A start that fails before its first step, because of its data for example, leaves nothing behind.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megapromoe.checkpoint.environment import describe_start
from megapromoe.checkpoint.origin import Origin, changed_settings, fixed_changes
from megapromoe.config.options import Config
from megapromoe.config.resolve import to_yaml
from megapromoe.config.schedule import describe_changes
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, UserError
from megapromoe.io import open_regular, staging_path, write_json, write_text

logger = logging.getLogger(__name__)

_LOCK_ATTEMPTS = 20


class RunDirectoryError(UserError):
    """A folder that cannot be this run's: not a run's, of another run, or not writable."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # rank 0 finds it and tells the others, so one rank need print it


class RunInUse(RunDirectoryError):
    """A folder that a live run owns; that run may end, or be one that a node failure has left behind."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class _Comparison:
    """A start beside the run in its folder.

    Attributes:
        changed: settings that differ, name -> [stored, new].
        data: identity of the data set, for environment.json; None if it has none, or cannot be read.
        anew: why the folder is configured anew, if it is.
    """

    changed: dict[str, list[Any]]
    data: str | None
    anew: str = ""


class RunDirectory:
    """The paths of a run. Any process may make one to read; `claim` and `open` make one that owns the folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.snapshots = self.folder / "snapshots"
        self.branches = self.folder / "branches"
        self.samples = self.folder / "samples"
        self.tensorboard = self.folder / "tensorboard"
        self.diverged = self.folder / "diverged.txt"
        self.lock_file = self.folder / "run.lock"
        self.changed: dict[str, list[Any]] = {}
        """Settings that differ from the last start's, name -> [then, now]; known to who has opened the folder."""
        self._lock: IO[str] | None = None
        self._start: tuple[list[dict[str, Any]], Config] | None = None  # claimed, and not recorded yet
        self._made_folder = self._made_lock = False

    @classmethod
    def open(
        cls, folder: Path, config: Config, world: int, force: Iterable[str] = (), *, launcher: str = "python"
    ) -> RunDirectory:
        """`claim`, and `record` at once: for a start that nothing can refuse any more."""
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
        """Owns the folder, which is made if needed, until `close` or the end of the process.

        Of the start nothing is written before `record`: if it fails until then, `close` leaves the folder as it was,
        and another start may be of another config. A run that took no step may be configured anew, and is then a new
        run. Called by one process of a job, rank 0. Other processes read the paths from `RunDirectory(folder)`.

        Args:
            world: ranks of the job.
            force: dotted names of `FIXED` fields that may differ from the stored config nonetheless.
            launcher: who started the job, for environment.json.

        Raises RunDirectoryError if a live run owns the folder, if it holds other things than a run, if the run in it
        took steps and its config differs in a `FIXED` field, or if it cannot be written.
        """
        run = cls(folder)
        try:
            with run._clear_errors():
                run._refuse_strangers()
                run._make_and_lock()
                comparison = run._compare(config, force)
                run.changed = comparison.changed
                entries = [] if comparison.anew else run._starts()
                first = {} if entries else {"run": uuid.uuid4().hex[:12]}
                entry = first | describe_start(config, world, launcher, comparison.changed, comparison.data)
                run._start = [*entries, entry], config
                run.diverged.unlink(missing_ok=True)
        except BaseException:
            run.close()
            raise
        if comparison.anew:
            logger.info("%s: %s", run.folder, comparison.anew)
        return run

    def record(self) -> None:
        """Writes what `claim` has prepared: config.yaml, and the start's entry in environment.json.

        Raises RunDirectoryError if the folder cannot be written.
        """
        assert self._start is not None, "of a run that was claimed"
        entries, config = self._start
        with self._clear_errors():
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.environment, entries, indent=2)
            write_text(self.config_file, to_yaml(config))
        self._start = None

    def state(self, config: Config, force: Iterable[str] = (), progress: str = "continues", step: int = 0) -> str:
        """What `open` would do, in words; changes nothing. Raises RunDirectoryError where `open` would.

        Args:
            progress: where the run would begin, see `history.progress`.
            step: of the checkpoint that it would begin from, 0 without one; for the learning rate.
        """
        with self._clear_errors():
            self._refuse_strangers()
            if self.lock_file.exists():
                self._take_lock(look=True)
                self.close()
            if not self.config_file.exists():
                return f"{self.folder}: a new run"
            comparison = self._compare(config, force)
        if comparison.anew:
            return f"{self.folder}: {comparison.anew}"
        listed = "".join(f"\n  {line}" for line in describe_changes(config, comparison.changed, step))
        return f"{self.folder}: {progress}" + (f"; changes{listed}" if listed else "")

    def took_steps(self) -> bool:
        """Whether anything is left of a step: a checkpoint, whole or not, a logged line, a picture, a branch.

        A folder that no start has recorded in environment.json counts as one that did: it is not ours to rewrite.
        """
        if not self.environment.is_file():
            return True
        if os.path.lexists(self.metrics) and not (self.metrics.is_file() and self.metrics.stat().st_size == 0):
            return True
        kept = (self.checkpoints, self.snapshots, self.samples, self.branches)
        return any(any(folder.glob("*")) for folder in kept)

    def owner(self) -> str | None:
        """Who trains in the folder now, as run.lock says; None if nobody does."""
        try:
            self._take_lock(look=True)
        except FileNotFoundError:
            return None
        except RunDirectoryError:
            return self.lock_file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        self.close()
        return None

    def close(self) -> None:
        """Frees the folder for another run. Of a start that was not recorded, nothing is left that it has made."""
        if self._lock is None:
            return
        if self._made_lock and not self.config_file.exists():
            with contextlib.suppress(OSError):
                self.lock_file.unlink()  # while it is locked: whoever waits for it sees that it is gone
                if self._made_folder:
                    self.folder.rmdir()  # fails where it holds something, such as a launcher's logs
        self._lock.close()
        self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where, reason = error.filename or self.folder, error.strerror or error
            raise RunDirectoryError(
                f"{where}: {reason}; a run must read and write here, or choose another --run"
            ) from error

    def _refuse_strangers(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunDirectoryError(f"{self.folder}: is a file; a run needs a folder, choose another --run")
        if not self.folder.is_dir() or self.config_file.exists():
            return
        # A start that was killed early leaves these; a launcher makes logs first.
        ours = {self.lock_file.name, *(p.name for p in (self.checkpoints, self.samples, self.tensorboard))}
        ours |= {"logs", "preflight", "flight_records"}
        ours |= {self.environment.name, *(staging_path(p).name for p in (self.environment, self.config_file))}
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in ours)
        if others or any(self.checkpoints.glob("*")):
            found = ", ".join(others[:3]) or self.checkpoints.name
            rule = f"is not empty (holds {found}) and has no config.yaml, so it is no run"
            raise RunDirectoryError(f"{self.folder}: {rule}; choose another --run, or an empty folder")

    def _make_and_lock(self) -> None:
        """Makes the folder if needed, and locks it. A start that failed meanwhile may have removed it: then again."""
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
            f"{self.folder}: other starts make and remove it all the time; try again, or choose another --run"
        )

    def _take_lock(self, look: bool = False) -> None:
        """Locks run.lock, or only sees whether it could (`look`).

        The system gives the lock free when this process ends, however it does.
        """
        file = open_regular(self.lock_file, os.O_RDONLY if look else os.O_RDWR | os.O_CREAT)
        lock = open(file, "r" if look else "r+", encoding="utf-8", errors="replace")  # noqa: SIM115, held while we live
        try:
            fcntl.flock(lock, fcntl.LOCK_NB | (fcntl.LOCK_SH if look else fcntl.LOCK_EX))
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            remedy = "wait for it or stop it, or choose another --run"
            raise RunInUse(f"{self.folder}: in use by a live run ({owner}); {remedy}") from error
        except OSError as error:  # some cluster file systems are mounted without locks
            logger.warning(
                "%s: this file system has no locks (%s); see to it that only one run uses the folder",
                self.lock_file,
                error.strerror,
            )
        if not look:
            lock.seek(0)
            lock.truncate()
            lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        self._lock = lock

    def _compare(self, config: Config, force: Iterable[str]) -> _Comparison:
        """What a start with `config` means for the folder. Raises RunDirectoryError if it may not be."""
        changed, forced = self._changed_settings(config), set(force)
        before = next((e["data"] for e in reversed(self._starts()) if e.get("data")), None)
        now = data_identity(config)
        fixed = fixed_changes(changed, forced)
        other_data = before is not None and now is not None and now != before and "data" not in forced
        if not fixed and not other_data:
            return _Comparison(changed, now or before)
        if not self.took_steps():
            what = ", ".join(fixed) or "the data"
            return _Comparison({}, now, f"its run took no step and is configured anew, as a new run (other: {what})")
        if fixed:
            listed = "".join(f"\n  - {key}: the run has {changed[key][0]!r}, not {changed[key][1]!r}" for key in fixed)
            raise RunDirectoryError(
                f"{self.config_file}: this folder is of a run with another config; "
                f"choose another --run, or restore these fields:{listed}"
            )
        assert before is not None and now is not None
        raise RunDirectoryError(
            f"data.path = {config.data.path!r}: holds other data than this run was trained on (SHA-256 of its"
            f" manifest {now[:12]}, the run's {before[:12]}); give the path of the run's data, or continue on this"
            " with --allow data"
        )

    def warmup(self) -> int | None:
        """`train.warmup` of the run in the folder, if it took steps; None if there is none, or it cannot be read."""
        try:
            stored = self.stored_settings() if self.took_steps() else None
        except (RunDirectoryError, OSError):
            return None  # whoever opens the folder reports it
        warmup = (stored or {}).get("train", {}).get("warmup")
        return warmup if type(warmup) is int else None

    def _changed_settings(self, config: Config) -> dict[str, list[Any]]:
        """Fields that differ from the stored config, name -> [stored, new]. Raises RunDirectoryError."""
        stored = self.stored_settings()
        return {} if stored is None else changed_settings(stored, config)

    def stored_settings(self) -> dict[str, dict[str, Any]] | None:
        """The sections of config.yaml; None without one. Raises RunDirectoryError if it is damaged."""
        if not self.config_file.exists():
            return None
        try:
            stored = read_yaml(self.config_file)
        except UnreadableFile as error:
            raise RunDirectoryError(f"{self.config_file}: is damaged ({error})") from error
        if not isinstance(stored, dict) or not all(isinstance(section, dict) for section in stored.values()):
            raise RunDirectoryError(f"{self.config_file}: is damaged; it must be a mapping of sections")
        return stored

    def origin(self, config: Config) -> Origin:
        """What a checkpoint must have in common with this run, after `claim`."""
        return Origin(self.identity(), self._starts_with_this()[-1].get("data"), config)

    def identity(self) -> str:
        """A name of the run that no other has, the same at every start; for manifests."""
        first = self._starts_with_this()[0]
        if "run" in first:
            return str(first["run"])
        # Of an earlier version, which had the hash of all that stands in the entry of the first start.
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]

    def _starts_with_this(self) -> list[dict[str, Any]]:
        """The entries of environment.json, and that of the start which has claimed the folder, recorded or not."""
        return self._starts() if self._start is None else self._start[0]

    def _starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json."""
        remedy = "move it away, and continue with --allow run: the run's identity was in it"
        try:
            entries = json.loads(self.environment.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(f"{self.environment}: is damaged ({error}); {remedy}") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RunDirectoryError(f"{self.environment}: is damaged (must be a list); {remedy}")
        return entries


def data_identity(config: Config) -> str | None:
    """SHA-256 of the manifest of the latents that a run trains on; None for other sources, or if it cannot be read.

    What cannot be read is refused where the data set is opened.
    """
    if config.data.source != "latents":
        return None
    from megapromoe.data.latents import LatentsError, read_manifest  # imports numpy and safetensors

    try:
        return read_manifest(Path(config.data.path)).identity
    except LatentsError:
        return None
