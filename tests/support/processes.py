"""Runs a function on several gloo processes under plain pytest, and on one.

`run(world, function, *arguments)` starts `world` processes that share a torch.distributed job, calls
`function(*arguments)` in each, and returns their results in rank order. The first rank that raises ends them all and
its traceback is shown; so does the time limit. Processes are forked from a server that has imported torch and
deepspeed once, so a start costs a fraction of a second.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch

_context = multiprocessing.get_context("forkserver")
# The last is imported by deepspeed.initialize and takes seconds.
_context.set_forkserver_preload(
    [
        "megapromoe.checkpoint.manager",
        "megapromoe.nn.parallelize",
        "megapromoe.data.datasets",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)


class WorkerFailed(AssertionError):
    """A rank raised; its traceback is the message."""


def run(world: int, function, *arguments, limit: float = 240.0) -> list:
    """Results of `function(*arguments)` on `world` ranks. `function` is importable; results can be pickled."""
    with tempfile.TemporaryDirectory() as folder:
        meet = os.path.join(folder, "store")
        pipes, workers = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            worker = _context.Process(target=_work, args=(rank, world, meet, there, function, arguments), daemon=True)
            worker.start()
            there.close()
            pipes.append(here)
            workers.append(worker)
        try:
            return _collect(pipes, time.monotonic() + limit)
        finally:
            for worker in workers:
                worker.join(timeout=5)
                if worker.is_alive():
                    worker.kill()
                    worker.join()


def _collect(pipes: list, deadline: float) -> list:
    results, open_pipes = {}, dict(enumerate(pipes))
    while open_pipes:
        ready = wait(list(open_pipes.values()), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise WorkerFailed(f"ranks {sorted(open_pipes)} did not end in time")
        for rank in [r for r, pipe in open_pipes.items() if pipe in ready]:
            try:
                good, value = pickle.loads(open_pipes.pop(rank).recv_bytes())
            except EOFError:
                good, value = False, "died without a word"
            if not good:
                raise WorkerFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _work(rank: int, world: int, meet: str, pipe, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "DS_ACCELERATOR": "cpu",
    }
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        # Plain pickle: multiprocessing's would hand over tensors in shared memory that ends with this process.
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        torch.distributed.destroy_process_group()
