"""Workers that stay: each call finds the process as new; errors and the time limit end the job and its workers."""

import gc
import multiprocessing
import os
import random
import shutil
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from deepspeed import DeepSpeedEngine
from support.levels import full
from support.processes import WorkerFailed, run
from support.training_runs import train

from megapromoe.checkpoint import manager
from megapromoe.engine.engine import Engine
from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.training import tensorboard_events


def rank_and_process() -> tuple[int, int]:
    return torch.distributed.get_rank(), os.getpid()


def left(*arguments) -> None:
    """What a test puts in the place of a function."""


def what_is_global() -> dict:
    return {
        "folder": os.getcwd(),
        "environment": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LEFT", "DS_ACCELERATOR")},
        "random": (random.random(), np.random.random(), float(torch.rand(()))),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "filters": len(warnings.filters),
        "patched": [
            value is left
            for value in (manager.write_rank, Engine.step, ROUTERS.get("left"), shutil.disk_usage, torch.Tensor.cpu)
        ],
        "added": hasattr(Engine, "left"),
        "count": repr(tensorboard_events._numbers),
    }


def leave_everything_changed(folder: str) -> None:
    os.chdir(folder)
    os.environ["LEFT"] = os.environ["DS_ACCELERATOR"] = "left"
    del os.environ["WORLD_SIZE"]
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    warnings.simplefilter("error")
    manager.write_rank = Engine.step = ROUTERS["left"] = shutil.disk_usage = torch.Tensor.cpu = left
    Engine.left = left
    next(tensorboard_events._numbers)


def test_a_call_finds_what_a_new_process_has(tmp_path):
    before = run(2, what_is_global)
    assert not any(before[0]["patched"]) and not before[0]["added"]
    processes_of_before = run(2, rank_and_process)
    run(2, leave_everything_changed, str(tmp_path))
    assert run(2, what_is_global) == before
    assert run(2, rank_and_process) == processes_of_before, "workers stay"
    assert [rank for rank, _ in run(3, rank_and_process)] == [0, 1, 2]


def raise_on_the_last_rank() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("the mistake of a rank")
    torch.distributed.barrier()


def leave_without_a_word() -> None:
    if torch.distributed.get_rank() == 0:
        os._exit(9)
    torch.distributed.barrier()


def sleep() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(
    "function, limit, message",
    [
        (
            raise_on_the_last_rank,
            60,
            r"rank 1:(.|\n)*in raise_on_the_last_rank(.|\n)*KeyError: 'the mistake of a rank'",
        ),
        (leave_without_a_word, 60, "rank 0:\ndied without a word"),
        (sleep, 0.3, r"ranks \[0, 1\] did not end in time"),
    ],
)
def test_a_failed_job_is_reported_and_its_workers_are_replaced(function, limit, message):
    before = run(2, rank_and_process)
    with pytest.raises(WorkerFailed, match=message):
        run(2, function, limit=limit)
    after = run(2, rank_and_process)
    assert not {process for _, process in before} & {process for _, process in after}


def leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def test_a_worker_with_a_thread_is_replaced():
    before = run(2, rank_and_process)
    run(1, leave_a_thread)
    after = run(2, rank_and_process)
    assert len(set(before) & set(after)) == 0 and {p for _, p in before} & {p for _, p in after} == {before[1][1]}


def exit_code_of_a_process() -> int:
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(5,))
    process.start()
    process.join()
    return process.exitcode


def test_a_worker_can_start_processes():
    assert run(1, exit_code_of_a_process) == [5]


def test_results_that_cannot_be_pickled_are_reported():
    with pytest.raises(WorkerFailed, match="cannot pickle"):
        run(1, threading.Lock)


@pytest.mark.full
def test_training_leaves_workers_as_they_are(tmp_path):
    before = run(2, rank_and_process)
    run(2, train, str(tmp_path), "train.steps=2")
    assert run(2, rank_and_process) == before


def engines_and_threads() -> tuple[int, int]:
    """How many engines this process holds, and how many threads it has, those of gloo included."""
    gc.unfreeze()
    engines = sum(issubclass(type(value), DeepSpeedEngine) for value in gc.get_objects())
    return engines, len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("stage", [full(1), 3])
def test_no_engine_and_no_process_group_stays_in_a_worker(stage, tmp_path):
    """Their threads would take processor time from all later calls."""
    ((engines, threads),) = run(1, engines_and_threads)
    assert engines == 0
    for number in range(2):
        run(1, train, str(tmp_path / str(number)), "train.steps=3", f"train.deepspeed=fp32_zero{stage}")
    assert run(1, engines_and_threads) == [(0, threads)]
