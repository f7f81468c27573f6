"""Jobs that are asked to stop by a terminal, or whose launcher is killed: they save, and lose nothing.

Processes are real; those without a launcher are forked. Ranks whose launcher is dead become children of the tests,
which so learn their exit codes.
`test_killed_jobs.py` has signals of a scheduler, and dead or hung ranks.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.forked_ranks import ForkedRank
from support.levels import full

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of, steps_in

BIN = Path(sys.executable).parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "RANK", "WORLD", "LOCAL"))}
ENV = {**CLEAN, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
MAIN = [sys.executable, "-m", "megapromoe"]
TRAIN = ["train", "--preset", "digits", "train.log_every=1", "train.save_every=100000", "model.hidden_size=32",
         "train.global_batch=32"]  # fmt: skip
ENDLESS = "train.steps=1000000"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def jobs():
    """Started programs; whatever is left of them when the test ends is killed, with all their processes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started: list[subprocess.Popen] = []
    yield started
    for job in started:
        for pid in (*descendants(job.pid), job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.communicate()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def start(jobs: list[subprocess.Popen], *words: str, env=ENV) -> subprocess.Popen:
    jobs.append(
        subprocess.Popen(
            words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    )
    return jobs[-1]


def descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def ranks_of(job: subprocess.Popen) -> list[int]:
    """The processes that train: those below the launcher that have no children which do."""
    below = [pid for pid in descendants(job.pid) if b"\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [pid for pid in below if not set(descendants(pid)) & set(below)]


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition, job: subprocess.Popen | None = None, limit: float = 300.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert job is None or job.poll() is None, job.communicate()[0][-3000:]
        time.sleep(0.05)


def check_saved(folder: Path) -> None:
    """The last step that was logged is saved."""
    (saved,) = steps_in(folder / "checkpoints")
    assert saved == steps(folder) >= 3
    Checkpoint(folder_of(folder / "checkpoints", saved)).verify()


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]


# ---- from a terminal


@pytest.mark.parametrize("number", [signal.SIGINT, full(signal.SIGHUP)])
def test_a_process_alone_saves(number, tmp_path, fault_table):
    folder = tmp_path / "run"
    job = ForkedRank([*TRAIN, ENDLESS, "--run-dir", str(folder)], ENV, tmp_path / "output")
    try:
        wait_for(lambda: steps(folder) >= 3 or job.poll() is not None)
        job.send_signal(number)
        code = job.wait(timeout=60)
    finally:
        job.kill()
    output = (tmp_path / "output").read_text()
    assert code == 75, output[-3000:]
    assert "asked to stop: step" in output
    check_saved(folder)
    name = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the terminal is closed (SIGHUP)"}[number]
    fault_table.append((f"{name}, one process", "saved, exit code 75", "nothing"))


@pytest.mark.full
def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path):
    env = ENV | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    folder = tmp_path / "run"
    job = ForkedRank([*TRAIN, "--run-dir", str(folder)], env, tmp_path / "output", call="hang_at(0, 0)")
    try:
        wait_for(lambda: (folder / "run.lock").exists() or job.poll() is not None)
        time.sleep(2)
        job.send_signal(signal.SIGINT)
        code = job.wait(timeout=20)
    finally:
        job.kill()
    assert code == 130 and "megapromoe: interrupted" in (tmp_path / "output").read_text()
    assert not steps_in(folder / "checkpoints")


@pytest.mark.full
def test_ctrl_c_under_torchrun(jobs, tmp_path, fault_table):
    """The terminal interrupts the launcher, which interrupts the ranks, each in a session of its own."""
    folder = tmp_path / "run"
    job = start(jobs, *torchrun("-m", "megapromoe", *TRAIN, ENDLESS, "parallel.ep=2", "--run-dir", str(folder)))
    wait_for(lambda: steps(folder) >= 3, job)
    os.killpg(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=90)
    assert job.returncode != 0 and "asked to stop: step" in output, output[-3000:]
    check_saved(folder)
    fault_table.append(("Ctrl-C under torchrun", "all ranks save after the same step", "nothing"))


@pytest.mark.full
def test_ctrl_c_under_mpirun(jobs, tmp_path):
    if shutil.which("mpirun", path=ENV["PATH"]) is None:
        pytest.skip("mpirun is not installed")
    folder = tmp_path / "run"
    mpirun = ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe"]
    job = start(jobs, *mpirun, *MAIN, *TRAIN, ENDLESS, "parallel.ep=2", "--run-dir", str(folder))
    wait_for(lambda: steps(folder) >= 3, job)
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=90)
    assert job.returncode != 0


# ---- a launcher that is killed


def launcher_command(launcher: str, folder: Path) -> list[str]:
    job = [*TRAIN, ENDLESS, "parallel.ep=2", "--run-dir", str(folder)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return {
        "torchrun": torchrun("--max-restarts", "3", "-m", "megapromoe", *job),
        "torchrun, started by a shell": torchrun("--no-python", "sh", "-c", '"$@"; true', "sh", *MAIN, *job),
        "deepspeed": [
            *(sys.executable, "-m", "deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19"),
            *(f"--master_port={port}", "--module", "megapromoe", *job),
        ],
        "mpirun": ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", *MAIN, *job],
    }[launcher]


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "torchrun, started by a shell", "deepspeed", "mpirun"])
def test_ranks_save_and_end_when_their_launcher_is_killed(launcher, jobs, tmp_path, fault_table):
    """Also where the launcher holds the store of the job, as torchrun does."""
    folder = tmp_path / "run"
    command = launcher_command(launcher, folder)
    if shutil.which(command[0], path=ENV["PATH"]) is None:
        pytest.skip(f"{command[0]} is not installed")
    job = start(jobs, *command)
    wait_for(lambda: steps(folder) >= 3, job)
    ranks = ranks_of(job)
    assert len(ranks) == 2
    direct = "shell" not in launcher
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    killed = time.monotonic()
    codes = []
    try:
        if direct:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        else:
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
        assert time.monotonic() - killed < 60
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=30)
    assert codes == [75, 75] * direct, output[-3000:]
    if launcher != "mpirun":  # through which the output of its ranks goes
        assert ", which started this rank, has ended" in output and "asked to stop: step" in output
    check_saved(folder)
    fault_table.append(
        (f"kill -9 of the launcher ({launcher})", "the ranks notice, save and end with exit code 75", "nothing")
    )


@pytest.mark.parametrize("by_hand", [full(False), full(True)])
def test_a_process_in_the_background_outlives_the_shell_that_started_it(by_hand, jobs, tmp_path):
    """With nohup, and no launcher; variables that are set by hand are no launcher either."""
    folder = tmp_path / "run"
    env = dict(ENV)
    if by_hand:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    job = start(
        jobs,
        "sh",
        "-c",
        'nohup "$@" & echo $!; sleep 3600',
        "sh",
        *MAIN,
        *TRAIN,
        ENDLESS,
        "--run-dir",
        str(folder),
        env=env,
    )
    pid = int(job.stdout.readline())
    try:
        wait_for(lambda: steps(folder) >= 3)
        os.killpg(job.pid, signal.SIGHUP)  # the terminal goes, the shell with it
        job.wait(timeout=20)
        before = steps(folder)
        wait_for(lambda: steps(folder) >= before + 20)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    check_saved(folder)
