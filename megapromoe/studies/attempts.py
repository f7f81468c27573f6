"""The starts of each job and how they ended, in attempts/NAME.jsonl, which only grows.

The file counts failures over all commands that have run the job, so that the limit of retries also holds when a command
is killed and repeated. A start whose command was killed has no end.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megapromoe.io import append_text
from megapromoe.run_lines import lines_of
from megapromoe.studies.causes import CAUSES, FAILED, Cause
from megapromoe.studies.study import Job, Study


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        code: exit code; None if it has no end yet, or was killed together with its command.
        cause: name of a `Cause`; "" if it is done, was stopped on request, or has no end.
        done: finished units (training steps or evaluated checkpoints) when it ended.
    """

    started: str
    host: str
    code: int | None = None
    cause: str = ""
    done: int = 0
    ended: str = ""

    @property
    def seconds(self) -> float:
        """From the start to the end, in whole seconds; 0 without an end."""
        try:
            duration = datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)
        except ValueError:
            return 0.0
        return max(0.0, duration.total_seconds())


def record_start(study: Study, job: Job) -> None:
    """Appends the start of a job. Raises OSError."""
    _append(study, job, {"started": _now(), "host": socket.gethostname(), "pid": os.getpid()})


def record_end(study: Study, job: Job, code: int, cause: Cause | None, done: int) -> None:
    """Appends the end of the last start of a job. Raises OSError."""
    _append(study, job, {"ended": _now(), "code": code, "cause": cause.name if cause else "", "done": done})


def attempts_of(study: Study, job: Job) -> list[Attempt]:
    """All starts of a job, oldest first; of an earlier version's study, those since it was continued."""
    attempts: list[Attempt] = []
    for line in lines_of(study.attempts_file(job)):
        if "started" in line:
            attempts.append(Attempt(str(line["started"]), str(line.get("host", ""))))
        elif attempts and attempts[-1].code is None and isinstance(line.get("code"), int):
            first = attempts.pop()
            done = line["done"] if isinstance(line.get("done"), int) else 0
            cause, ended = str(line.get("cause", "")), str(line.get("ended", ""))
            attempts.append(Attempt(first.started, first.host, line["code"], cause, done, ended))
    return attempts


def failures_in_a_row(attempts: Sequence[Attempt], done: int) -> int:
    """Number of the last attempts that failed by a cause that can pass and left the job at `done` units.

    Starts without an end do not count, and do not interrupt the row: they say nothing about the job.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.code is None:
            continue
        if attempt.done != done or not CAUSES.get(attempt.cause, FAILED).passes:
            break
        count += 1
    return count


def process_seconds(attempts: Sequence[Attempt]) -> float:
    """Seconds of all starts that have ended."""
    return sum(attempt.seconds for attempt in attempts)


def in_words(attempts: Sequence[Attempt]) -> str:
    """The number of attempts and the causes of earlier ends, such as "3 attempts: a rank hung (2)"; "" for one."""
    if len(attempts) < 2:
        return ""
    causes: dict[str, int] = {}
    for attempt in attempts:
        if attempt.cause:
            causes[attempt.cause] = causes.get(attempt.cause, 0) + 1
    listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in causes.items())
    return f"{len(attempts)} attempts" + (f": {listed}" if listed else "")


def _append(study: Study, job: Job, line: dict[str, Any]) -> None:
    path = study.attempts_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    append_text(path, json.dumps(line) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
