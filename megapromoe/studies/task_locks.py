"""A lock for each task of a study, so that several commands may train one study and none trains a task of another.

The training inherits the lock from the command that starts it: a task stays locked until its training has ended, also
if the command was killed before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from typing import IO

from megapromoe.io import open_regular
from megapromoe.studies.study import Job, Study

logger = logging.getLogger(__name__)


def lock_task(study: Study, job: Job) -> IO[str] | None:
    """The open lock of a task, to be closed when it has ended; None while another process trains it.

    The lock is given free by the system when all processes that have it open end, however they do. On a file system
    without locks, a warning is logged, and the task counts as locked by this process. Raises OSError.
    """
    path = study.lock_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_regular(path, os.O_RDWR | os.O_CREAT)
    lock = open(file, "r+", encoding="utf-8")  # noqa: SIM115, held while the task is trained
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:  # some cluster file systems are mounted without locks
        logger.warning("%s: no locks here (%s); let only one command train this task", path, error.strerror)
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def is_locked(study: Study, job: Job) -> bool:
    """Whether a process holds the lock of a job, as far as this machine sees; changes no file."""
    try:
        with open(study.lock_file(job), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def owner(study: Study, job: Job) -> str:
    """Who has locked a job, in words."""
    try:
        text = study.lock_file(job).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    return text or "another process"
