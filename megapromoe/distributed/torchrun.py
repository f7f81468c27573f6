"""torchrun that exits with the code of its ranks and leaves them time to save.

`python -m megapromoe.distributed.torchrun` takes the arguments of torchrun. torchrun itself returns 1 for every failure
of a rank, so that a launcher cannot decide by the exit code whether to repeat a job. On a signal it kills ranks that
have not saved within 30 s. This program passes SIGTERM, SIGINT, SIGHUP and SIGUSR1 on to the ranks instead, and ends
when they have ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from megapromoe.errors import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
UNUSED_SIGNAL = "SIGWINCH"  # torchrun must handle at least one; nobody sends this to a process without a terminal


def main(arguments: list[str]) -> int:
    """Runs torchrun with these arguments. Returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup or in a background job of a shell
            signal.signal(number, _pass_on)
    try:
        run.run(run.parse_args([f"--signals-to-handle={UNUSED_SIGNAL}", *arguments]))
    except ChildFailedError as error:
        code = exit_code(failure.exitcode for failure in error.failures.values())
        if code != ExitCode.STOPPED:  # which ranks failed, and with what
            print(error, file=sys.stderr, flush=True)
        return code
    return ExitCode.DONE


def exit_code(codes: Iterable[int]) -> int:
    """The exit code of a node from those of its ranks that failed; negative ones are signals that ended a rank.

    When a rank fails, torchrun sends SIGTERM to the others, which then may save and return 75, or get SIGKILL. So the
    highest of the other codes counts, and signals only if there is no other code.
    """
    failed = [code for code in codes if code not in (ExitCode.DONE, ExitCode.STOPPED)]
    if not failed:
        return ExitCode.STOPPED
    returned = [code for code in failed if code > 0]
    return max(returned) if returned else 128 - min(failed)


def child_processes(pid: int) -> list[int]:
    """The children of the main thread of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in child_processes(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
