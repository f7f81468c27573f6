"""What kills or stops a job: nothing worse than the steps since the last checkpoint is lost.

Processes are real where they are killed: `megapromoe train` under torchrun, signals from outside. The larger ones of
two jobs that differ in nothing else are forked. What is compared with them trains in the workers of the tests.
`parallel/test_faults.py` has damaged files.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.command_ranks import exit_codes
from support.forked_job import ForkedJob
from support.levels import full
from support.training_runs import losses

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of, steps_in

STEPS = 24
JOB = ["--preset", "digits", f"train.steps={STEPS}", "train.log_every=1", "train.save_every=5", "train.keep_last=50",
       "parallel.tp=2", "parallel.ep=2", "model.hidden_size=32", "train.global_batch=32"]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
STARTED: list[subprocess.Popen | ForkedJob] = []


def start(folder: Path, ranks: int, *more: str, restarts: int = 0) -> subprocess.Popen:
    """`megapromoe train` on so many processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "-m", "megapromoe", "train", "--run-dir", str(folder), *JOB, *more]
    job = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(job)
    return job


def start_small_or_forked(folder: Path, ranks: int, *more: str) -> subprocess.Popen | ForkedJob:
    """The same under torchrun on two processes; four are forked from a server that has imported everything."""
    if ranks == 2:
        return start(folder, ranks, *more)
    STARTED.append(ForkedJob(ranks, ["train", "--run-dir", str(folder), *JOB, *more], folder.parent))
    return STARTED[-1]


def codes_of(job: subprocess.Popen | ForkedJob, output: str) -> set[int]:
    """The exit codes of ranks that were not killed; those that torchrun reports."""
    if isinstance(job, ForkedJob):
        return {rank.returncode for rank in job.ranks} - {-signal.SIGKILL}
    return {int(code) for code in re.findall(r"exitcode\s*:\s*(\d+)", output)}


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Ends the jobs of a test that failed half-way."""
    yield
    while STARTED:
        job = STARTED.pop()
        if isinstance(job, ForkedJob):
            job.kill()
        elif job.poll() is None:
            for pid in (*ranks_of(job), job.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait()


def ranks_of(launcher: subprocess.Popen | ForkedJob) -> list[int]:
    """Process ids of the launcher's workers."""
    if isinstance(launcher, ForkedJob):
        return [rank.pid for rank in launcher.ranks]
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(c) for c in children if "megapromoe" in Path(f"/proc/{c}/cmdline").read_text()]


def logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition, limit: float = 240.0, launcher: subprocess.Popen | ForkedJob | None = None) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert launcher is None or launcher.poll() is None, launcher.communicate(timeout=60)[0][-3000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], list[float]]:
    """The losses of a job on so many ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def losses_on(ranks: int) -> list[float]:
        assert exit_codes(ranks, folder, ["train", "--run-dir", f"on-{ranks}", *JOB]) == [0] * ranks
        return losses(folder / f"on-{ranks}")

    return losses_on


@pytest.mark.full
def test_kill_9_during_a_step_and_torchrun_restarts_the_job(undisturbed, tmp_path, fault_table):
    ranks, folder = 2, tmp_path / "run"
    job = start(folder, ranks, restarts=1)
    wait_for(lambda: logged(folder) >= 12, launcher=job)
    os.kill(ranks_of(job)[ranks // 2], signal.SIGKILL)
    killed = time.monotonic()

    def steps_again() -> bool:
        starts, lines = folder / "environment.json", folder / "metrics.jsonl"
        return len(json.loads(starts.read_text())) == 2 and lines.stat().st_mtime > starts.stat().st_mtime + 0.5

    wait_for(steps_again, launcher=job)
    back = time.monotonic() - killed
    assert back <= 120, "from the kill to the next step"
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output[-3000:]
    assert losses(folder) == undisturbed(ranks)
    assert len(json.loads((folder / "environment.json").read_text())) == 2
    what, lost = "resumed automatically, identical losses", f"{back:.0f} s from the kill to the next step"
    fault_table.append(
        ("kill -9 of a rank during a step, under torchrun --max-restarts", what, f"{lost}, at most 5 steps repeated")
    )


@pytest.mark.full
@pytest.mark.parametrize("number, receivers", [(signal.SIGTERM, "all ranks, twice"), (signal.SIGUSR1, "one rank")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_signal_saves_and_requests_a_requeue(number, receivers, ranks, undisturbed, tmp_path, fault_table):
    folder = tmp_path / "run"
    job = start_small_or_forked(folder, ranks)
    wait_for(lambda: logged(folder) >= 7, launcher=job)
    pids = ranks_of(job)
    for pid in pids if receivers == "all ranks, twice" else pids[-1:]:
        os.kill(pid, number)
        if receivers == "all ranks, twice":
            os.kill(pid, number)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    step = int(re.search(r"asked to stop: step (\d+) of", output)[1])
    assert len(re.findall("asked to stop", output)) == 1, "one rank speaks for all"
    assert codes_of(job, output) == {75}
    assert steps_in(folder / "checkpoints")[-1] == step
    Checkpoint(folder_of(folder / "checkpoints", step)).verify()
    fault_table.append(
        (
            f"{number.name} to {receivers}",
            "all ranks save after the same step, exit code 75, identical losses afterwards",
            "nothing",
        )
    )
    assert exit_codes(ranks, tmp_path, ["train", "--run-dir", "run", *JOB]) == [0] * ranks
    assert losses(folder) == undisturbed(ranks)


@pytest.mark.parametrize("ranks, hung", [full(2, 0), full(2, 1), (4, 0), full(4, 2)])
def test_a_hung_rank_is_named(ranks, hung, tmp_path, fault_table):
    """A stopped process; the others name it, say where and when, and end within a few times the step time-out."""
    limit = 5.0
    job = start_small_or_forked(tmp_path / "run", ranks, f"train.step_timeout={limit:g}", "train.steps=100000")
    wait_for(lambda: logged(tmp_path / "run") >= 7, launcher=job)
    pids = ranks_of(job)
    os.kill(pids[hung], signal.SIGSTOP)
    stopped = time.monotonic()
    others = [pid for rank, pid in enumerate(pids) if rank != hung]
    wait_for(lambda: not any(alive(r) for r in others))
    took = time.monotonic() - stopped
    os.kill(pids[hung], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    message = rf"no progress for \d+ s .*silent: rank {hung}, last in section '[a-z ]+' of step \d+"
    assert re.search(message, output), output
    assert took <= 4 * limit  # on busy cores; twice the time-out on free ones
    where = "others name rank, section and step, exit code 76"
    fault_table.append(
        (
            f"SIGSTOP of rank {hung}, step time-out {limit:g} s",
            where,
            f"{took:.0f} s, and the steps since the last save",
        )
    )
    assert 76 in codes_of(job, output)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
