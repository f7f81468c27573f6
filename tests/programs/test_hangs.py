"""Hangs without a launcher that keeps the store: rank 0 holds it, as under srun, and takes it along.

Processes are real and started one by one, so that nothing but the watchdog ends them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

RANKS = 3
TINY = ["--preset", "digits", "train.log_every=1", "train.global_batch=12", "model.hidden_size=32", "model.depth=2"]
STARTED: list[subprocess.Popen] = []


def start(folder: Path, *words: str, world: int = RANKS, program: str = "") -> list[subprocess.Popen]:
    """`megapromoe WORDS` on every rank, told by variables alone; what each says is in the file `said-RANK`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    jobs = []
    for rank in range(world):
        who = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        env = clean | {name: str(value) for name, value in who.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        with open(folder / f"said-{rank}", "wb") as out:
            command = [sys.executable, "-m", "megapromoe", *words]
            if program:  # Python, with the folder of the tests as its first argument
                command = [sys.executable, "-c", program, str(Path(__file__).parents[1]), *words]
            jobs.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
    STARTED.extend(jobs)
    return jobs


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        job = STARTED.pop()
        if job.poll() is None:
            job.kill()
        job.wait()


def said(folder: Path, rank: int) -> str:
    return (folder / f"said-{rank}").read_text()


def wait_until(condition, folder: Path, limit: float = 240.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "\n".join(said(folder, r)[-3000:] for r in range(RANKS))
        time.sleep(0.05)


def steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_frozen_holder_of_the_store_is_named_by_the_others(tmp_path, fault_table):
    limit = 4.0
    jobs = start(
        tmp_path, "train", "--run-dir", str(tmp_path / "run"), *TINY, "train.steps=100000",
        f"train.step_timeout={limit:g}",
    )  # fmt: skip
    wait_until(lambda: steps(tmp_path) >= 5, tmp_path)
    jobs[0].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    wait_until(lambda: all(job.poll() is not None for job in jobs[1:]), tmp_path, 120.0)
    took = time.monotonic() - frozen
    assert [job.returncode for job in jobs[1:]] == [76, 76]
    for rank in (1, 2):
        assert re.search(
            rf"rank {rank}: no progress for \d+ s \(train.step_timeout = 4\) in section '[a-z ]+' of step \d+; the"
            r" process that holds the job's store \(rank 0 or the launcher\) does not answer",
            said(tmp_path, rank),
        ), said(tmp_path, rank)
    assert took < 60
    fault_table.append(
        (
            f"SIGSTOP of rank 0, which holds the store, step time-out {limit:g} s",
            "others name the holder of the store, section and step, exit code 76",
            f"{took:.0f} s, and the steps since the last save",
        )
    )


def test_a_hung_job_leaves_the_stacks_of_every_rank_that_runs(tmp_path):
    """One rank waits for its data; all say where each of their threads is, and the one to blame is named."""
    jobs = start(
        tmp_path, "train", "--run-dir", str(tmp_path / "run"), *TINY, "train.steps=100000", "train.step_timeout=4",
        program="import sys; sys.path.insert(0, sys.argv.pop(1)); from support.hanging import hang_at; hang_at(2, 4)",
    )  # fmt: skip
    wait_until(lambda: all(job.poll() is not None for job in jobs), tmp_path)
    assert [job.returncode for job in jobs] == [76] * RANKS
    for rank in range(RANKS):
        text = said(tmp_path, rank)
        assert "furthest behind: rank 2, last in section 'data' of step 4" in text, text
        assert "most recent call first" in text and "in _train" in text, text
    assert "in wait_for_ever" in said(tmp_path, 2) and "in wait_for_ever" not in said(tmp_path, 0)


def test_a_rank_that_hangs_before_the_first_step_is_named(tmp_path):
    jobs = start(
        tmp_path, "train", "--run-dir", str(tmp_path / "run"), *TINY, "train.step_timeout=4", "train.timeout=30",
        program="import sys; sys.path.insert(0, sys.argv.pop(1)); from support.hanging import hang_at; hang_at(1, 0)",
    )  # fmt: skip
    wait_until(lambda: all(job.poll() is not None for job in jobs), tmp_path)
    for rank in range(RANKS):
        text = said(tmp_path, rank)
        assert jobs[rank].returncode == 76 and "rank 1, last in start-up: opening the data" in text, text
