"""Runs a function on several gloo processes under plain pytest, and on one.

`run(world, function, *arguments)` calls `function(*arguments)` on `world` ranks of a new torch.distributed job, and
returns their results in rank order. The first rank that raises ends the job, and its traceback is shown; so does the
time limit.

The ranks are worker processes that stay for the calls to come and block until then. They are forked from a server
that has imported everything once. After each call a worker puts back what tests change (`clean_state`). A worker is
replaced by a new one if its call failed, if it left a thread behind, or if its memory has grown large.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import torch
from support.clean_state import CleanState

LARGE = 1 << 30  # bytes of memory past which a worker is replaced

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["support.preload"])


class WorkerFailed(AssertionError):
    """A rank raised; its traceback is the message."""


class _Worker:
    """A process and the pipe to it."""

    def __init__(self):
        self.pipe, theirs = context.Pipe()
        # Not a daemon, which could not start processes of its own; it ends as its pipe closes.
        self.process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def end(self, patience: float) -> None:
        """Ends the process: as its pipe closes, or after `patience` seconds by force."""
        self.pipe.close()
        self.process.join(timeout=patience)
        self.process.kill()
        self.process.join()


_workers: list[_Worker] = []


def run(world: int, function, *arguments, limit: float = 240.0) -> list:
    """Results of `function(*arguments)` on `world` ranks. `function` is importable; results can be pickled."""
    start_server()
    while len(_workers) < world:
        _workers.append(_Worker())
    ranks = _workers[:world]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(ranks):
                job = (sys.path, rank, world, os.path.join(folder, "store"))
                # Two pickles: the second may need the path of the first to find its modules.
                worker.pipe.send_bytes(pickle.dumps((*job, pickle.dumps((function, arguments)))))
            return _collect(ranks, time.monotonic() + limit)
    except BaseException:
        _end(ranks, patience=0)
        raise


def stop_workers() -> None:
    """Ends all workers."""
    _end(list(_workers), patience=10)


atexit.register(stop_workers)  # before multiprocessing waits for them


def start_server() -> None:
    """Starts the server that workers are forked from. It finds `support` on the path it is started with."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [path])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def _end(workers: list[_Worker], patience: float) -> None:
    for worker in workers:
        _workers.remove(worker)
        worker.end(patience)


def _collect(ranks: list[_Worker], deadline: float) -> list:
    """Results by rank; workers that cannot serve again are ended."""
    results, waiting, used_up = {}, dict(enumerate(ranks)), []
    while waiting:
        ready = wait([worker.pipe for worker in waiting.values()], timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise WorkerFailed(f"ranks {sorted(waiting)} did not end in time")
        for rank in [r for r, worker in waiting.items() if worker.pipe in ready]:
            worker = waiting.pop(rank)
            try:
                good, value, reusable = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                good, value, reusable = False, "died without a word", False
            if not good:
                raise WorkerFailed(f"rank {rank}:\n{value}")
            results[rank] = pickle.loads(value)
            if not reusable:
                used_up.append(worker)
    _end(used_up, patience=10)
    return [results[rank] for rank in range(len(ranks))]


# ---- in a worker


def _serve(pipe) -> None:
    """Does one call after another until the test process ends."""
    assert "support.preload" in sys.modules, "the server of workers could not import support.preload"
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    clean = CleanState()
    while True:
        try:
            path, rank, world, store, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        try:
            # Plain pickle: multiprocessing's would hand over tensors in shared memory that ends with this process.
            value = pickle.dumps(_call(rank, world, store, call))
            clean.restore()
            threads = [t for t in threading.enumerate() if t is not threading.main_thread()]
            reply = True, value, not threads and _memory() < LARGE
        except BaseException:
            reply = False, traceback.format_exc(), False
        pipe.send_bytes(pickle.dumps(reply))


def _call(rank: int, world: int, store: str, call: bytes):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.distributed.barrier()  # a rank that leaves while others still connect would end them
    function, arguments = pickle.loads(call)
    value = function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return value


def _memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
