"""Ends the process at once, from any thread and in any state, and prints what explains the state.

A regular exit would join threads that wait for other ranks. An immediate exit closes the connections, so that the
other ranks get an error as well.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from megapromoe.io import write_bytes

_DUMP_TIMEOUT = 10.0  # seconds for writing NCCL's flight record

_abandoned: list[threading.Thread] = []


def hard_exit(message: str, code: int, flight_records: Path | None = None, linger: float = 0.0) -> NoReturn:
    """Ends this process with a message and the Python stacks of all its threads on stderr.

    Args:
        message: printed after "megapromoe, ".
        code: exit code.
        flight_records: folder to which NCCL's flight record is written: see `runtime.enable_flight_records`.
        linger: seconds from the printing to the end, in which other threads and ranks can print.
    """
    print(f"megapromoe, {message}", file=sys.stderr, flush=True)
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    if flight_records is not None:
        writer = threading.Thread(target=write_flight_record, args=(flight_records,), daemon=True)
        writer.start()
        writer.join(_DUMP_TIMEOUT)
    time.sleep(linger)
    os._exit(code)


def write_flight_record(folder: Path) -> None:
    """Writes NCCL's flight record (the last collectives) to `folder`/rank_RANK; does nothing without NCCL.

    If the record cannot be written, a message on stderr gives the reason.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or "nccl" not in dist.get_backend():
        return
    rank = dist.get_rank()
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # only in builds with NCCL

        write_bytes(folder / f"rank_{rank}", _dump_nccl_trace(), parents=True)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"megapromoe, rank {rank}: no flight record: {error}", file=sys.stderr, flush=True)


def exit_with_traceback(error: BaseException) -> NoReturn:
    """Ends this process with the traceback of an error and exit code 1."""
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def abandon(thread: threading.Thread) -> None:
    """Notes a daemon thread that may be in a call of torch's store which does not return. See `end_if_abandoned`."""
    if thread.is_alive():
        _abandoned.append(thread)


def end_if_abandoned(code: int) -> None:
    """Ends this process with exit code `code` if an abandoned thread still runs; otherwise does nothing.

    If the call of such a thread returned while the interpreter ends, Python would end the thread in the middle of C++
    code, which aborts the process with exit code 134 ("terminate called without an active exception").
    """
    if any(thread.is_alive() for thread in _abandoned):
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # a closed output
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
