"""Why a job ended: from its exit code, its last output, and the files of its run.

Some causes can pass, so that the same command may succeed when it is repeated; others stay until something is changed.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megapromoe.errors import ExitCode


@dataclass(frozen=True)
class Cause:
    """Why a job ended before it was done.

    Attributes:
        passes: whether a repeated start can succeed without a change of anything.
    """

    name: str
    passes: bool


PREEMPTED = Cause("stopped from outside, and saved", passes=True)
HUNG = Cause("a rank hung", passes=True)
KILLED = Cause("killed by a signal", passes=True)
NODE_FAILED = Cause("a node or its network failed", passes=True)
MISCONFIGURED = Cause("wrong command, configuration or installation", passes=False)
DIVERGED = Cause("diverged", passes=False)
OUT_OF_MEMORY = Cause("out of memory", passes=False)
DISK_FULL = Cause("disk full", passes=False)
INCOMPLETE = Cause("ended without its results", passes=False)
FAILED = Cause("error", passes=False)
CAUSES = {
    cause.name: cause
    for cause in (
        *(PREEMPTED, HUNG, KILLED, NODE_FAILED),
        *(MISCONFIGURED, DIVERGED, OUT_OF_MEMORY, DISK_FULL, INCOMPLETE, FAILED),
    )
}

CANNOT_START = (13, 126, 127)  # of srun and shells: the program cannot be executed, or does not exist
# Texts of torch, Python, the kernel and SLURM; of our errors, those of RanksMissing and StoreUnreachable.
_OUT_OF_MEMORY = r"OutOfMemoryError|CUDA out of memory|can't allocate memory|Cannot allocate memory|\bMemoryError\b"
_OUT_OF_MEMORY += r"|oom[-_]kill|Out [Oo]f [Mm]emory"
_DISK_FULL = r"No space left on device|Disk quota exceeded|no room, need|a checkpoint was not saved"
_NODE_FAILED = r"holds the job's store|has waited \d+ s at .* ranks|cannot reach|NCCL (error|WARN)|ncclRemoteError"
_NODE_FAILED += r"|Connection (reset|closed) by peer|Socket [Tt]imeout|ECC error|uncorrectable|GPU is lost|NODE_FAIL"
_NODE_FAILED += r"|unspecified launch failure|DistNetworkError"


def cause_of(code: int, reason: str, output: str, diverged: bool) -> Cause:
    """The cause of the end of a job that is not done, and was not requested to stop by its command.

    Args:
        code: its exit code, or minus the number of the signal that killed it.
        reason: its error message, such as that after "megapromoe: ".
        output: the end of its output.
        diverged: whether the run has a diverged.txt, which each start of a training removes.
    """
    if code in (0, ExitCode.FAILED):  # launchers return 1 for every failure of a rank
        code = code_of_rank(output) or code
    if code == 0:
        return INCOMPLETE
    if code == ExitCode.MISCONFIGURED or code in CANNOT_START:
        return MISCONFIGURED
    if code == ExitCode.STOPPED:
        return PREEMPTED
    if code == ExitCode.HUNG:
        return HUNG
    if diverged:
        return DIVERGED
    if re.search(_OUT_OF_MEMORY, output):
        return OUT_OF_MEMORY
    if re.search(_DISK_FULL, reason):
        return DISK_FULL
    if is_signal(code):
        return KILLED
    return NODE_FAILED if re.search(_NODE_FAILED, reason) else FAILED


def code_of_rank(output: str) -> int | None:
    """The exit code of the rank that failed first, from the report of torchrun; None without such a report."""
    report = output.rpartition("Root Cause")[2] if "Root Cause" in output else ""
    match = re.search(r"exitcode\s*:\s*(-?\d+)", report)
    return int(match[1]) if match else None


def is_signal(code: int) -> bool:
    """Whether an exit code is that of a process that a signal has killed, directly or below a shell or srun."""
    if code < 0:
        return True
    return code > 128 and code - 128 in {number.value for number in signal.Signals} and code != ExitCode.OUTPUT_CLOSED


def in_brackets(outcome: Mapping[str, Any]) -> str:
    """The cause in an outcome file, such as " (a rank hung)"; "" where the exit code says as much."""
    cause = outcome.get("cause", "")
    return f" ({cause})" if cause not in ("", FAILED.name) and outcome["code"] >= 0 else ""
