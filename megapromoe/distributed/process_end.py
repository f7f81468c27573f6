"""The end of a process at once, from any thread and whatever it waits for, leaving what explains why it waited.

An orderly end would wait for threads that wait for other ranks. Ending closes the connections, and those ranks notice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from megapromoe.io import write_bytes

_DUMP = 10.0  # seconds that NCCL's flight recorder has to write


def end(message: str, code: int, flight_records: Path | None = None) -> NoReturn:
    """Ends this process with a message; leaves the Python stacks of all its threads on stderr.

    Args:
        code: exit code.
        flight_records: the folder to which NCCL's flight record is written: see `runtime.enable_flight_records`.
    """
    print(f"megapromoe, {message}", file=sys.stderr, flush=True)
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    if flight_records is not None:
        writer = threading.Thread(target=write_flight_record, args=(flight_records,), daemon=True)
        writer.start()
        writer.join(_DUMP)
    os._exit(code)


def write_flight_record(folder: Path) -> None:
    """Writes NCCL's last collectives to `folder`/rank_RANK; says so where that cannot be. Does nothing without NCCL."""
    import torch.distributed as dist

    if not dist.is_initialized() or "nccl" not in dist.get_backend():
        return
    rank = dist.get_rank()
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # of builds with NCCL

        write_bytes(folder / f"rank_{rank}", _dump_nccl_trace(), parents=True)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"megapromoe, rank {rank}: no flight record: {error}", file=sys.stderr, flush=True)


def leave(error: BaseException) -> NoReturn:
    """Ends this process with the traceback of an error and exit code 1."""
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
