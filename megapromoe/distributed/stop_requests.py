"""Requests to stop that a run answers with a checkpoint: signals, Ctrl-C, and the death of the launcher.

SIGTERM, SIGUSR1 and SIGHUP ask to stop after the step under way. So does Ctrl-C (SIGINT) once there are steps; before,
it raises KeyboardInterrupt. A second Ctrl-C ends the process at once, whatever it waits for. SIGHUP and SIGINT that are
ignored at the start stay ignored: nohup, or a shell's background job.

Where torchrun, deepspeed, srun or mpirun has started this rank and is killed without a chance to end it, nobody would
restart the rank or collect its exit code. That too is a request to stop. A process without such a launcher is never
stopped by the end of what has started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from megapromoe.distributed.launch_environment import Launch

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code
ECHO = 1.0  # seconds in which a launcher passes on a Ctrl-C that the terminal has sent to the rank too
MAX_ANCESTORS = 8  # between a rank and its launcher: shells, numactl, containers

# Programs and modules of each launcher that start ranks: a word of the command line, or the name of the process.
LAUNCHERS = {
    "torchrun": ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch"),
    "srun": ("slurmstepd",),
    "mpirun": (
        *("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "orted", "prterun", "prted", "prte"),
        *("hydra_pmi_proxy", "hydra_bstrap_proxy", "pmi_proxy"),
    ),
}


class StopRequest:
    """Whether this rank was asked to stop: call it to know. Made by `listening`."""

    def __init__(self, launch: Launch | None):
        self.reason = ""
        self._launch = launch or Launch("python")
        self._has_steps = False
        self._first_interrupt: float | None = None
        self._launcher = find_launcher(self._launch)

    def __call__(self) -> bool:
        """True after a request to this rank; others may not know of it."""
        if not self.reason and self._launcher is not None and not self._launcher.lives():
            self.reason = f"{self._launcher.name} (process {self._launcher.pid}), which started this rank, is gone"
            if self._launch.local_rank == 0:
                logger.warning("rank %d: %s; the run stops with a checkpoint", self._launch.rank, self.reason)
        return bool(self.reason)

    def steps_begin(self) -> None:
        """From now on Ctrl-C asks for a stop with a checkpoint; before, there is nothing new to save."""
        self._has_steps = True

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal, in the main thread."""
        if number == signal.SIGINT and not self._has_steps:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def take_interrupt(self) -> None:
        """Counts a Ctrl-C, in a thread: the main thread handles no signal while it waits in C++."""
        now = time.monotonic()
        echo = 0.0 if self._launch.launcher == "python" else ECHO
        if self._first_interrupt is None:
            self._first_interrupt = now
            if self._has_steps and self._launch.rank == 0:
                logger.warning("Ctrl-C: the run stops after this step, with a checkpoint; again ends it at once")
        elif now - self._first_interrupt >= echo:
            with contextlib.suppress(OSError):
                print(f"megapromoe, rank {self._launch.rank}: interrupted twice", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)


@contextlib.contextmanager
def listening(launch: Launch | None = None) -> Iterator[StopRequest]:
    """Takes requests to stop this process; gives what knows of them. For the main thread.

    The handlers of signals stay afterwards, so that a launcher's late SIGTERM does not change the exit code.

    Args:
        launch: this rank, whose launcher is watched; None for a process that is no rank, whose Ctrl-C stays as it is.
    """
    request = StopRequest(launch)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, request.take)
    hears_interrupts = launch is not None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    for number in (signal.SIGHUP, *([signal.SIGINT] if hears_interrupts else [])):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, request.take)
    if not hears_interrupts:
        yield request
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=_count_interrupts, args=(reading, request), name="interrupts", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _forget_in_children()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _count_interrupts(reading: int, request: StopRequest) -> None:
    """Reads the numbers of signals as they arrive, until the other end of the pipe is closed."""
    while numbers := os.read(reading, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            request.take_interrupt()


_registered: list[bool] = []


def _forget_in_children() -> None:
    """A forked process has the pipe too; signals to it are not signals to this one."""
    if not _registered:
        _registered.append(True)
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)


class Launcher:
    """The process of a launcher, recognised by its id and the time of its start."""

    def __init__(self, pid: int, name: str):
        self.pid, self.name = pid, name
        self._start = _status(pid)[1]

    def lives(self) -> bool:
        """False once it has ended, or its id is that of another process."""
        state, start, _ = _status(self.pid)
        return start == self._start and state not in ("Z", "X", "")


def find_launcher(launch: Launch) -> Launcher | None:
    """The process that has started this rank; None where no launcher did, or it cannot be seen."""
    names = LAUNCHERS.get(launch.launcher, ())
    pid = os.getppid()
    for _ in range(MAX_ANCESTORS if names else 0):
        if name := _is_launcher(pid, names):
            return Launcher(pid, name)
        pid = _status(pid)[2]
        if pid <= 0:
            return None
    return None


def _is_launcher(pid: int, names: Sequence[str]) -> str:
    """Which of `names` the process is, or ""."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        process = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
    for word in (process, *command[:6]):
        # A module is started as `-m NAME`, or by the path of its file.
        module = ".".join(Path(word.removesuffix(".py")).parts[-3:]) if word.endswith(".py") else word
        for name in names:
            if name in (module, os.path.basename(word)) or process == name[:15]:
                return name
    return ""


def _status(pid: int) -> tuple[str, str, int]:
    """State, time of the start, and parent of a process; empty, empty and 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", "", 0
    return fields[0], fields[19], int(fields[1])
