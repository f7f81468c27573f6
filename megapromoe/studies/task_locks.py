"""A lock for each job of a study, so that several commands may run one study without running a job twice.

The process of a job inherits the lock from the command that starts it, so the job stays locked until it ends, even if
the command is killed before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from megapromoe.io import open_regular
from megapromoe.studies.study import Job, Study

logger = logging.getLogger(__name__)


def lock_task(study: Study, job: Job) -> IO[str] | None:
    """The open lock file of a job, to be closed when it has ended; None if another process holds the lock.

    The operating system releases the lock when all processes that have the file open have ended. On a file system
    without locks a warning is logged, and the job counts as locked by this process. Raises OSError.
    """
    return lock_path(study.lock_file(job))


def lock_path(path: Path) -> IO[str] | None:
    """Like `lock_task`, for any lock file of a study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_regular(path, os.O_RDWR | os.O_CREAT)
    lock = open(file, "r+", encoding="utf-8")  # noqa: SIM115, open while the job runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:  # some cluster file systems are mounted without locks
        logger.warning(
            "%s: the file system has no locks (%s); run this task with only one command at a time", path, error.strerror
        )
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def is_locked(study: Study, job: Job) -> bool:
    """Whether a process holds the lock of a job, as far as it is visible on this machine. Changes no file."""
    try:
        with open(study.lock_file(job), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def owner(study: Study, job: Job) -> str:
    """The process that holds the lock of a job, as text."""
    try:
        text = study.lock_file(job).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    return text or "another process"
