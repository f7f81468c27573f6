"""Trains the tasks of a study: `megapromoe train` in processes of their own, some at a time.

A task that fails is written down and the others go on. Repeating resumes what is not done, from its last checkpoint.
Several commands may train one study at once: each task has a lock, and who finds it taken waits for its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megapromoe.io import naming_errors, open_regular, write_text
from megapromoe.studies.grid import Task
from megapromoe.studies.study import Study, failure
from megapromoe.studies.task_locks import lock_task, owner

STOPPED = 75  # of `megapromoe train`: stopped by a signal, and saved
POLL = 0.5  # seconds between looks at the running tasks


def command(study: Study, task: Task) -> list[str]:
    """What trains a task: the launcher, or this Python, and `-m megapromoe train`."""
    start = list(study.recipe.launcher) or [sys.executable]
    # --run-dir: torchrun would take --run for an option of its own.
    words = ["--config", str(study.config(task)), "--run-dir", str(study.run(task))]
    return [*start, "-m", "megapromoe", "train", *words]


@dataclass
class _Started:
    task: Task
    launcher: str
    process: subprocess.Popen
    lock: IO[str]
    log: IO
    from_byte: int
    since: float


def run_tasks(
    study: Study, tasks: Iterable[Task], jobs: int = 1, asked_to_stop: Callable[[], bool] = lambda: False
) -> dict[str, int]:
    """Trains those of `tasks` that are not done, `jobs` at a time; returns the exit code of each, 0 for those done.

    Args:
        asked_to_stop: once it is true, the running ones are asked to save and stop, and no other is started; these,
            and those that had no turn, have code 75.

    A task that another command trains is left to it. When that has ended, what it reports holds, and a task that it
    stopped, or that it left when it was killed, is trained here.

    A bar tells of the steps of all tasks; where stderr is no terminal, a line for each task that ends.
    """
    tasks = list(tasks)
    codes = {task.name: 0 for task in tasks if study.done(task)}
    waiting = [task for task in tasks if task.name not in codes]
    running: list[_Started] = []
    left_to_others: dict[str, dict[str, Any] | None] = {}  # tasks, and their outcome when they were found locked
    told = False
    total = sum(task.config.train.steps for task in tasks)
    with tqdm(total=total, unit="step", disable=None, dynamic_ncols=True, smoothing=0.05) as bar:
        ended = sum(task.config.train.steps for task in tasks if task.name in codes)
        bar.update(ended)
        bar.unpause()
        try:
            while waiting or running:
                if asked_to_stop() and not told:
                    told = True
                    _ask(running)
                for task in list(waiting):
                    if told or len(running) >= jobs:
                        break
                    lock = lock_task(study, task)
                    if lock is None:
                        if task.name not in left_to_others:
                            left_to_others[task.name] = study.outcome(task)
                            _tell(bar, f"{task.name}: is trained by another command ({owner(study, task)}); left to it")
                        continue
                    waiting.remove(task)
                    code = _code_of_others(study, task, left_to_others)
                    if code is None:
                        running.append(_start(study, task, lock))
                        continue
                    lock.close()
                    codes[task.name] = code
                    ended += study.steps_logged(task)
                    how = "done" if code == 0 else "failed"
                    _tell(bar, f"{task.name}: {how} by another command ({len(codes)} of {len(tasks)})")
                if told and not running:
                    break
                time.sleep(POLL)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    code = _finish(study, one, told)
                    codes[one.task.name] = code
                    ended += study.steps_logged(one.task)
                    _tell(bar, f"{one.task.name}: {_words(code, study, one)} ({len(codes)} of {len(tasks)})")
                steps = ended + sum(study.steps_logged(one.task) for one in running)
                bar.set_postfix_str(" ".join(one.task.name for one in running), refresh=False)
                bar.update(max(0, steps - bar.n))
        except BaseException:  # Ctrl-C among them: nothing goes on training behind the back of who stopped it
            _ask(running)
            for one in running:
                with contextlib.suppress(KeyboardInterrupt):
                    one.process.wait()
                _finish(study, one, True)
            raise
    return codes | {task.name: STOPPED for task in waiting}


def exit_code(codes: dict[str, int]) -> int:
    """Of all: 0 if all are done, 75 if some were stopped and saved, else 1. A task alone tells its own."""
    if len(codes) == 1:
        code = next(iter(codes.values()))
        return code if code >= 0 else 128 - code  # killed by a signal, as a shell tells it
    if STOPPED in codes.values():
        return STOPPED
    return int(any(codes.values()))


def _code_of_others(study: Study, task: Task, left_to_others: dict[str, dict[str, Any] | None]) -> int | None:
    """The exit code of a task that another command has trained since this one began; None: it is to be trained here."""
    if study.done(task):
        return 0
    if task.name not in left_to_others:
        return None
    outcome = study.outcome(task)
    if outcome is None or outcome == left_to_others[task.name] or outcome["code"] in (0, STOPPED):
        return None
    return outcome["code"]


def _start(study: Study, task: Task, lock: IO[str]) -> _Started:
    path = study.log(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = command(study, task)
    study.outcome_file(task).unlink(missing_ok=True)  # of an earlier start
    file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    log = open(file, "ab", buffering=0)  # noqa: SIM115, held while the process lives
    begin = log.tell()
    with naming_errors(path):
        log.write(f"$ {' '.join(words)}\n".encode())
    # A session of its own: Ctrl-C reaches this process alone, which then asks the task to save.
    try:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # the task stays locked while it is trained, whatever becomes of this process
        )
    except OSError as error:
        log.write(f"{words[0]}: {error.strerror}\n".encode())
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(127)"], start_new_session=True)
    return _Started(task, Path(words[0]).name, process, lock, log, begin, time.monotonic())


def _ask(running: list[_Started]) -> None:
    """Asks the tasks to save and end, as `megapromoe train` does: SIGTERM to all their processes.

    srun alone gets SIGUSR1, which it hands on to the ranks on all nodes; at SIGTERM it would kill them.
    """
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            if one.launcher == "srun":
                one.process.send_signal(signal.SIGUSR1)
            else:
                os.killpg(one.process.pid, signal.SIGTERM)


def _finish(study: Study, one: _Started, told: bool) -> int:
    """Writes down how a task ended; returns its code."""
    one.log.close()
    code = one.process.returncode
    if study.done(one.task):
        code = 0
    elif told:  # launchers have codes of their own for a job that was asked to stop
        code = STOPPED
    elif code == 0:
        code = 1  # it says all is well, and has not saved its last step
    outcome = {
        "code": code,
        "said": _last_words(study, one) if code else "",
        "seconds": round(time.monotonic() - one.since, 1),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(study.outcome_file(one.task), json.dumps(outcome) + "\n", parents=True)
    one.lock.close()
    return code


def _last_words(study: Study, one: _Started) -> str:
    """What the log of this start says went wrong: from the last line of `megapromoe:` on, else its last line."""
    with open(study.log(one.task), "rb") as file:
        file.seek(max(one.from_byte, file.seek(0, os.SEEK_END) - 65536))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [i for i, line in enumerate(lines) if re.match(r"megapromoe[:,] ", line)]
    return "\n".join(lines[ours[-1] :] if ours else lines[-1:])[:2000]


def _words(code: int, study: Study, one: _Started) -> str:
    seconds = f"{time.monotonic() - one.since:.0f} s"
    if code == 0:
        return f"done in {seconds}"
    if code == STOPPED:
        return f"stopped after {seconds}, saved; repeat the command to go on"
    outcome = study.outcome(one.task)
    assert outcome is not None, "written when the task ended"
    ended = f"failed with exit code {code}" if code > 0 else failure(code)
    return f"{ended} after {seconds}; {study.log(one.task)} ends with: {outcome['said']}"


def _tell(bar: tqdm, line: str) -> None:
    bar.write(line, file=sys.stderr) if not bar.disable else print(line, file=sys.stderr, flush=True)
