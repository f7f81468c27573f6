"""The run directory: all that a run leaves behind, in one folder that explains itself and has one owner.

==================  =================================================================================
config.yaml         the resolved config of the latest start
environment.json    a list, one entry per start: versions, host, ranks, command line, git commit
metrics.jsonl       one line per logged step
checkpoints/        step-XXXXXXXX/
branches/           what a start that went back left behind, see `history.py`
samples/            pictures drawn while training
tensorboard/        events
logs/               what each rank said, a folder for each attempt (launchers)
diverged.txt        why the latest start ended, if its last steps were skipped; launchers do not repeat it
run.lock            locked by the run that lives; its text says who
==================  =================================================================================

A second start in the same folder continues the run. What would make it another run is refused; see `origin.FIXED`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from megapromoe.checkpoint.origin import Origin, changed_settings, is_fixed
from megapromoe.config.options import Config
from megapromoe.config.resolve import to_yaml
from megapromoe.config.schedule import describe_changes
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, UserError
from megapromoe.io import open_regular, staging_path, write_json, write_text
from megapromoe.versions import versions

logger = logging.getLogger(__name__)


class RunDirectoryError(UserError):
    """A folder that cannot be this run's: not a run's, of another run, or not writable."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # rank 0 finds it and tells the others, so one rank need print it


class RunInUse(RunDirectoryError):
    """A folder that a live run owns; that run may end, or be one that a node failure has left behind."""

    exit_code = ExitCode.FAILED


class RunDirectory:
    """The paths of a run. Any process may make one to read; `open` makes one that owns the folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.branches = self.folder / "branches"
        self.samples = self.folder / "samples"
        self.tensorboard = self.folder / "tensorboard"
        self.diverged = self.folder / "diverged.txt"
        self.lock_file = self.folder / "run.lock"
        self.changed: dict[str, list[Any]] = {}
        """Settings that differ from the last start's, name -> [then, now]; known to who has opened the folder."""
        self._lock: IO[str] | None = None

    @classmethod
    def open(
        cls, folder: Path, config: Config, world: int, force: Iterable[str] = (), *, launcher: str = "python"
    ) -> RunDirectory:
        """Makes the folder, or takes it up again, and owns it until `close` or the end of the process.

        Called by one process of a job, rank 0. Other processes read the paths from `RunDirectory(folder)`.

        Args:
            world: ranks of the job.
            force: dotted names of `FIXED` fields that may differ from the stored config nonetheless.
            launcher: who started the job, for environment.json.

        Raises RunDirectoryError, leaving all but run.lock as it was, if a live run owns the folder, if it
        holds other things than a run, if its config differs in a `FIXED` field, or if it cannot be written.
        """
        run = cls(folder)
        try:
            with run._clear_errors():
                run._refuse_strangers()
                run.folder.mkdir(parents=True, exist_ok=True)
                run._take_lock()
                changed = run.changed = run._compare(config, force)
                data = run._compare_data(config, force)
                entries = run._starts()
                first = {} if entries else {"run": uuid.uuid4().hex[:12]}
                entries.append(first | _environment(config, world, launcher, changed, data))
                for path in (run.checkpoints, run.samples, run.tensorboard):
                    path.mkdir(exist_ok=True)
                write_json(run.environment, entries, indent=2)
                write_text(run.config_file, to_yaml(config))
                run.diverged.unlink(missing_ok=True)
        except BaseException:
            run.close()
            raise
        return run

    def state(self, config: Config, force: Iterable[str] = (), progress: str = "continues", step: int = 0) -> str:
        """What `open` would do, in words; changes nothing. Raises RunDirectoryError where `open` would.

        Args:
            progress: where the run would begin, see `history.progress`.
            step: of the checkpoint that it would begin from, 0 without one; for the learning rate.
        """
        with self._clear_errors():
            self._refuse_strangers()
            if not self.config_file.exists():
                return f"{self.folder}: a new run"
            if self.lock_file.exists():
                self._take_lock(look=True)
                self.close()
            changed = self._compare(config, force)
            self._compare_data(config, force)
        listed = "".join(f"\n  {line}" for line in describe_changes(config, changed, step))
        return f"{self.folder}: {progress}" + (f"; changes{listed}" if listed else "")

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
        """Gives the folder free for another run."""
        if self._lock is not None:
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
        ours |= {"logs", "preflight"}
        ours |= {self.environment.name, *(staging_path(p).name for p in (self.environment, self.config_file))}
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in ours)
        if others or any(self.checkpoints.glob("*")):
            found = ", ".join(others[:3]) or self.checkpoints.name
            rule = f"is not empty (holds {found}) and has no config.yaml, so it is no run"
            raise RunDirectoryError(f"{self.folder}: {rule}; choose another --run, or an empty folder")

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

    def _compare(self, config: Config, force: Iterable[str]) -> dict[str, list[Any]]:
        """Fields that differ from the stored config, name -> [stored, new]; raises if they may not."""
        if not self.config_file.exists():
            return {}
        try:
            stored = read_yaml(self.config_file)
        except UnreadableFile as error:
            raise RunDirectoryError(f"{self.config_file}: is damaged ({error})") from error
        if not isinstance(stored, dict) or not all(isinstance(section, dict) for section in stored.values()):
            raise RunDirectoryError(f"{self.config_file}: is damaged; it must be a mapping of sections")
        changed = changed_settings(stored, config)
        forced = set(force)
        wrong = [key for key in changed if key not in forced and is_fixed(key)]
        if wrong:
            listed = "".join(f"\n  - {key}: the run has {changed[key][0]!r}, not {changed[key][1]!r}" for key in wrong)
            raise RunDirectoryError(
                f"{self.config_file}: this folder is of a run with another config; "
                f"choose another --run, or restore these fields:{listed}"
            )
        return changed

    def _compare_data(self, config: Config, force: Iterable[str]) -> str | None:
        """The identity of the data set, for environment.json; None if it has none, or was not found.

        Raises RunDirectoryError if the run's last start had another one, unless `force` holds "data".
        """
        before = next((e["data"] for e in reversed(self._starts()) if e.get("data")), None)
        now = data_identity(config)
        if before is not None and now is not None and now != before and "data" not in set(force):
            raise RunDirectoryError(
                f"data.path = {config.data.path!r}: holds other data than this run was trained on (SHA-256 of its"
                f" manifest {now[:12]}, the run's {before[:12]}); give the path of the run's data, or continue on this"
                " with --allow data"
            )
        return now or before

    def origin(self, config: Config) -> Origin:
        """What a checkpoint must have in common with this run, after `open`."""
        starts = self._starts()
        return Origin(self.identity(), starts[-1].get("data"), config)

    def identity(self) -> str:
        """A name of the run that no other has, the same at every start; for manifests."""
        first = self._starts()[0]
        if "run" in first:
            return str(first["run"])
        # Of an earlier version, which had the hash of all that stands in the entry of the first start.
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]

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


def _environment(
    config: Config, world: int, launcher: str, changed: dict[str, list[Any]], data: str | None
) -> dict[str, Any]:
    """One entry of environment.json."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launcher": launcher,
        "layout": asdict(config.layout(world)),
        "versions": {"python": platform.python_version(), **versions(("megapromoe", "torch", "deepspeed", "numpy"))},
        "git": _git_state(Path(__file__).resolve()),
        "changed": changed,
        "data": data,
    }


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether tracked files differ from it; or None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a package installed inside another project's checkout is not
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
