"""Requests to stop a run with a checkpoint: signals, Ctrl-C, and the loss of the launcher.

SIGTERM, SIGUSR1 and SIGHUP request a stop after the current step. Ctrl-C (SIGINT) does too after the first step has
begun; before, it raises KeyboardInterrupt. A second Ctrl-C ends the process at once. SIGHUP and SIGINT that are ignored
when the process starts stay ignored, as under nohup or in a background job of a shell.

If torchrun, deepspeed, srun or mpirun has started this rank and is killed, no process is left that restarts the rank or
reads its exit code. This counts as a request to stop too. A process without such a launcher is not stopped by the end
of its parent process.
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

from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.errors import ExitCode

logger = logging.getLogger(__name__)

ECHO = 1.0  # seconds during which a launcher may forward a Ctrl-C that the terminal has sent to the rank as well
MAX_ANCESTORS = 8  # processes between a rank and its launcher: shells, numactl, containers

# Programs and modules of each launcher that start ranks: a word of the command line, or the process name.
LAUNCHERS = {
    "torchrun": (
        *("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch"),
        "megapromoe.distributed.torchrun",
    ),
    "srun": ("slurmstepd",),
    "mpirun": (
        *("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "orted", "prterun", "prted", "prte"),
        *("hydra_pmi_proxy", "hydra_bstrap_proxy", "pmi_proxy"),
    ),
}


class StopRequest:
    """Whether this rank should stop: call the object to find out. Created by `install_signal_handlers`.

    Attributes:
        reason: the name of the signal or the lost launcher; "" without a request.
    """

    def __init__(self, launch: LaunchEnvironment | None):
        self.reason = ""
        self._launch = launch or LaunchEnvironment("python")
        self._has_steps = False
        self._first_interrupt: float | None = None
        self._launcher = find_launcher(self._launch)

    def __call__(self) -> bool:
        """True after a request to this rank. Other ranks may not have received one."""
        if not self.reason and self._launcher is not None and not self._launcher.is_running():
            self.reason = f"{self._launcher.name} (process {self._launcher.pid}), which started this rank, has ended"
            if self._launch.local_rank == 0:
                logger.warning("rank %d: %s; the run stops with a checkpoint", self._launch.rank, self.reason)
        return bool(self.reason)

    def steps_begin(self) -> None:
        """After this call Ctrl-C requests a stop with a checkpoint; before it there is nothing new to save."""
        self._has_steps = True

    def handle_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal, in the main thread."""
        if number == signal.SIGINT and not self._has_steps:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def count_interrupt(self) -> None:
        """Counts a Ctrl-C. Runs in a thread, because the main thread handles no signals while it runs C++ code."""
        now = time.monotonic()
        echo = 0.0 if self._launch.launcher == "python" else ECHO
        if self._first_interrupt is None:
            self._first_interrupt = now
            if self._has_steps and self._launch.rank == 0:
                logger.warning("Ctrl-C: the run stops after this step with a checkpoint; press it again to end at once")
        elif now - self._first_interrupt >= echo:
            with contextlib.suppress(OSError):
                print(f"megapromoe, rank {self._launch.rank}: interrupted twice", file=sys.stderr, flush=True)
            os._exit(ExitCode.INTERRUPTED)


@contextlib.contextmanager
def install_signal_handlers(launch: LaunchEnvironment | None = None) -> Iterator[StopRequest]:
    """Installs handlers for requests to stop this process and yields the request. Call it in the main thread.

    The signal handlers remain after the block, so that a late SIGTERM of a launcher does not change the exit code.

    Args:
        launch: this rank, whose launcher is observed; None for a process that is not a rank: Ctrl-C then keeps its
            default effect.
    """
    request = StopRequest(launch)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, request.handle_signal)
    handles_interrupts = launch is not None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    for number in (signal.SIGHUP, *([signal.SIGINT] if handles_interrupts else [])):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, request.handle_signal)
    if not handles_interrupts:
        yield request
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=_count_interrupts, args=(reading, request), name="interrupts", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _disable_wakeup_in_children()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _count_interrupts(reading: int, request: StopRequest) -> None:
    """Reads signal numbers from the wakeup pipe until its other end is closed."""
    while numbers := os.read(reading, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            request.count_interrupt()


_fork_handler_registered: list[bool] = []


def _disable_wakeup_in_children() -> None:
    """Keeps forked processes from writing to the pipe, which they inherit: their signals are not for this process."""
    if not _fork_handler_registered:
        _fork_handler_registered.append(True)
        os.register_at_fork(after_in_child=_disable_wakeup)


def _disable_wakeup() -> None:
    with contextlib.suppress(ValueError):  # in a process that was not forked by the main thread
        signal.set_wakeup_fd(-1)


class Launcher:
    """The process of a launcher, identified by its id and start time."""

    def __init__(self, pid: int, name: str):
        self.pid, self.name = pid, name
        self._start = _status(pid)[1]

    def is_running(self) -> bool:
        """False after the process has ended, even if its id belongs to a new process."""
        state, start, _ = _status(self.pid)
        return start == self._start and state not in ("Z", "X", "")


def find_launcher(launch: LaunchEnvironment) -> Launcher | None:
    """The launcher process among the ancestors of this one; None without a launcher, or if it is not visible."""
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
    """The one of `names` that the process is an instance of, or ""."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        process = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
    for word in (process, *command[:6]):
        # A module is started by `-m NAME` or by the path of its file.
        module = ".".join(Path(word.removesuffix(".py")).parts[-3:]) if word.endswith(".py") else word
        for name in names:
            if name in (module, os.path.basename(word)) or process == name[:15]:
                return name
    return ""


def _status(pid: int) -> tuple[str, str, int]:
    """State, start time and parent of a process; "", "" and 0 if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", "", 0
    return fields[0], fields[19], int(fields[1])
