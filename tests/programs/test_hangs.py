"""Hangs without a launcher that keeps the store: rank 0 holds it, as under srun, and takes it along.

Each rank is a process of its own, so that nothing but the watchdog ends it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support.forked_ranks import ForkedRank

pytestmark = pytest.mark.full

RANKS = 3
TINY = ["--preset", "digits", "train.log_every=1", "train.global_batch=12", "model.hidden_size=32", "model.depth=2"]
STARTED: list[ForkedRank | subprocess.Popen] = []


def start(folder: Path, *words: str, world: int = RANKS, call: str = "sys.exit(main())") -> list[ForkedRank]:
    """`megapromoe WORDS` on every rank, by environment variables alone; each writes the file `output-RANK`.

    Args:
        call: Python that runs the command line, with the names of `support.hanging`.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs = []
    for rank in range(world):
        ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        env = clean_environment() | {name: str(value) for name, value in ranks.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        jobs.append(ForkedRank(list(words), env, folder / f"output-{rank}", call))
    STARTED.extend(jobs)
    return jobs


def clean_environment() -> dict[str, str]:
    """The environment of the tests, without the variables of launchers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        job = STARTED.pop()
        if job.poll() is None:
            job.kill()
        job.wait()


def output_of(folder: Path, rank: int) -> str:
    return (folder / f"output-{rank}").read_text()


def wait_until(condition, folder: Path, limit: float = 240.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "\n".join(file.read_text()[-3000:] for file in folder.glob("output-*"))
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
            output_of(tmp_path, rank),
        ), output_of(tmp_path, rank)
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
        call="hang_at(2, 4)",
    )  # fmt: skip
    wait_until(lambda: all(job.poll() is not None for job in jobs), tmp_path)
    assert [job.returncode for job in jobs] == [76] * RANKS
    for rank in range(RANKS):
        text = output_of(tmp_path, rank)
        assert "furthest behind: rank 2, last in section 'data' of step 4" in text, text
        assert "most recent call first" in text and "in _train" in text, text
    assert "in wait_for_ever" in output_of(tmp_path, 2) and "in wait_for_ever" not in output_of(tmp_path, 0)


def test_a_rank_that_hangs_before_the_first_step_is_named(tmp_path):
    jobs = start(
        tmp_path, "train", "--run-dir", str(tmp_path / "run"), *TINY, "train.step_timeout=4", "train.timeout=20",
        call="hang_at(1, 0)",
    )  # fmt: skip
    wait_until(lambda: all(job.poll() is not None for job in jobs), tmp_path)
    for rank in range(RANKS):
        text = output_of(tmp_path, rank)
        assert jobs[rank].returncode == 76 and "rank 1, last in start-up: opening the data" in text, text


def end_of(jobs: list[subprocess.Popen], folder: Path, limit: float = 240.0, frozen: int | None = None) -> list[int]:
    """Exit codes, once all ranks have ended but the frozen one, which is then killed."""
    waiting = [job for rank, job in enumerate(jobs) if rank != frozen]
    wait_until(lambda: all(job.poll() is not None for job in waiting), folder, limit)
    return [job.returncode for job in waiting]


def training(folder: Path, *settings: str) -> list[str]:
    return ["train", "--run-dir", str(folder / "run"), *TINY, "train.warmup=0", *settings]


WRITE = "megapromoe.checkpoint.manager:write_rank"


@pytest.mark.parametrize("last", [False, True], ids=["on the way", "the last"])
def test_a_rank_that_freezes_while_it_saves_is_named(last, tmp_path, fault_table):
    """Between two steps as well as at the end, where all the others wait for its file."""
    settings = ["train.save_every=3", f"train.steps={3 if last else 1000}", "train.step_timeout=4", "train.timeout=16"]
    call = f"patient_start(); hang_in(1, {WRITE!r}, freeze)"
    jobs = start(tmp_path, *training(tmp_path, *settings), world=2, call=call)
    started = time.monotonic()
    assert end_of(jobs, tmp_path, frozen=1) == [76], output_of(tmp_path, 0)
    assert "silent: rank 1, last in " in output_of(tmp_path, 0), output_of(tmp_path, 0)
    assert time.monotonic() - started < 200
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]")), "a checkpoint without that rank's file"
    fault_table.append(
        (
            f"a rank freezes while it writes {'the last' if last else 'a'} checkpoint",
            "named by the others, exit code 76, no partial checkpoint",
            "the steps since the last save",
        )
    )


def test_a_rank_whose_disk_hangs_while_it_saves_fails_the_save_and_is_named_by_the_next(tmp_path, fault_table):
    """The rank trains on meanwhile: its first save fails after half of `train.timeout`, and training continues."""
    settings = ["train.save_every=100", "train.steps=100000", "train.step_timeout=4", "train.timeout=16"]
    call = f"patient_start(); hang_in(1, {WRITE!r})"
    jobs = start(tmp_path, *training(tmp_path, *settings), world=2, call=call)
    assert end_of(jobs, tmp_path) == [76, 76], output_of(tmp_path, 0)
    for rank in (0, 1):
        text = output_of(tmp_path, rank)
        assert "furthest behind: rank 1, last in writing this rank's file of the checkpoint of step 100" in text, text
        assert "s more for this" in text
    fault_table.append(
        (
            "a rank's disk hangs while it writes a checkpoint",
            "the save fails; at the next one the rank is named, exit code 76",
            "the steps since the last save",
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["train.steps=1", "train.step_timeout=6", "train.timeout=120", "sample.steps=4", "sample.batch=4"]
    (job,) = start(folder, *training(folder, *settings), world=1)
    assert job.wait(timeout=240) == 0, output_of(folder, 0)
    return folder / "run"


@pytest.mark.parametrize(
    "command, target, place",
    [
        (["sample", "--num-images", "32", "--out", "OUT"], "megapromoe.sampling.generation:generate", "chunks"),
        (
            ["evaluate", "--num-images", "130", "--samples", "OUT"],
            "megapromoe.evaluation.image_metrics:_Totals.update",
            "features of",
        ),
    ],
    ids=["sample", "evaluate"],
)
def test_a_hang_in_sampling_and_in_evaluation_is_named(command, target, place, trained, tmp_path, fault_table):
    words = [word if word != "OUT" else str(tmp_path / "out") for word in command]
    jobs = start(
        tmp_path,
        *words,
        "--run-dir",
        str(trained),
        world=2,
        call=f"patient_start(); hang_in(1, {target!r})",
    )
    assert end_of(jobs, tmp_path) == [76, 76], output_of(tmp_path, 0)
    for rank in (0, 1):
        text = output_of(tmp_path, rank)
        assert re.search(rf"furthest behind: rank 1, last in {place} .*Repeat the command to resume", text), text
    fault_table.append(
        (f"a rank hangs in `{command[0]}`", "the rank and its section are named, exit code 76", "nothing")
    )


def test_many_steps_of_a_drawing_are_no_hang(tmp_path):
    """It takes three times the limit."""
    settings = ["train.steps=2", "train.sample_every=2", "train.step_timeout=4", "sample.steps=24", "sample.batch=64"]
    call = "patient_start(); slow_sampler(0.5)"
    jobs = start(tmp_path, *training(tmp_path, *settings), world=2, call=call)
    assert end_of(jobs, tmp_path) == [0, 0], output_of(tmp_path, 0)
    assert list((tmp_path / "run" / "samples").glob("step-*2.png"))


MICRO_STEP = "megapromoe.engine.engine:Engine.micro_step"


def test_a_first_step_that_compiles_may_take_longer(tmp_path):
    """The same pause is a hang in any other step."""
    settings = ["train.steps=3", "train.step_timeout=3", "train.timeout=400"]  # compilers on busy cores
    jobs = {}
    for name, step in (("first", 1), ("second", 2)):
        call = f"patient_start(); compile_by_graph(); hang_in(None, {MICRO_STEP!r}, slow(12), {step})"
        words = training(tmp_path / name, *settings, "train.compile=true")
        jobs[name] = start(tmp_path / name, *words, world=2, call=call)
    for name, codes in (("first", [0, 0]), ("second", [76, 76])):
        assert end_of(jobs[name], tmp_path / name) == codes, output_of(tmp_path / name, 0)


def test_a_rank_that_freezes_in_a_first_step_that_compiles_is_named(tmp_path, fault_table):
    """Before the collectives of the others give up, which name nobody."""
    settings = ["train.step_timeout=4", "train.timeout=16", "train.compile=true"]
    call = f"patient_start(); compile_by_graph(); hang_in(1, {MICRO_STEP!r}, freeze)"
    jobs = start(tmp_path, *training(tmp_path, *settings), world=2, call=call)
    assert end_of(jobs, tmp_path, frozen=1) == [76], output_of(tmp_path, 0)
    text = output_of(tmp_path, 0)
    # It freezes as this section begins, and may have reported only the one before.
    assert re.search(r"silent: rank 1, last in section '(data|forward and backward)' of step 1", text), text
    assert "7.5 s more for this" in text, text
    fault_table.append(
        ("a rank freezes in the first, compiling step", "the rank and its section are named, exit code 76", "nothing")
    )


def test_a_rank_that_freezes_while_it_reads_the_checkpoint_is_named(trained, tmp_path, fault_table):
    shutil.copytree(trained, tmp_path / "run")
    settings = ["train.steps=100", "train.step_timeout=4", "train.timeout=16", "sample.steps=4", "sample.batch=4"]
    place, target = "reading the checkpoint", "megapromoe.checkpoint.format:Checkpoint.verify"
    call = f"patient_start({place!r}); hang_in(1, {target!r}, freeze)"
    jobs = start(tmp_path, *training(tmp_path, *settings), world=2, call=call)
    assert end_of(jobs, tmp_path, frozen=1) == [76], output_of(tmp_path, 0)
    assert "silent: rank 1, last in start-up: reading the checkpoint" in output_of(tmp_path, 0), output_of(tmp_path, 0)
    fault_table.append(
        ("a rank freezes while it reads the checkpoint", "the rank and its section are named, exit code 76", "nothing")
    )


def images(folder: Path, count: int = 24) -> Path:
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number, 2 * number, 3 * number)).save(path)
    return folder


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_freezes_in_encode_is_named_and_the_repeated_command_continues(frozen, tmp_path, fault_table):
    """Rank 0 holds the store; the others have nothing to do any more, and wait for it."""
    source, out = images(tmp_path / "images"), tmp_path / "latents"
    words = ["encode", "--images", str(source), "--autoencoder", "none", "--resolution", "8", "--out", str(out)]
    words += ["--shard-size", "4", "--step-timeout", "4"]
    call = f"patient_start(); hang_in({frozen}, 'megapromoe.data.encode:_write_shard', freeze, 2)"
    jobs = start(tmp_path, *words, world=2, call=call)
    assert end_of(jobs, tmp_path, frozen=frozen) == [76], output_of(tmp_path, 1 - frozen)
    text = output_of(tmp_path, 1 - frozen)
    blamed = "the process that holds the job's store" if frozen == 0 else "silent: rank 1, last in shard"
    assert blamed in text and "(--step-timeout = 4)" in text, text
    jobs[frozen].kill()
    again = tmp_path / "again"
    assert end_of(start(again, *words, world=2), again) == [0, 0], output_of(again, 0)
    assert f"{out}: 24 records" in output_of(again, 0)
    fault_table.append(
        (
            f"rank {frozen} freezes in `encode`",
            f"{'the holder of the store' if frozen == 0 else 'the rank'} is named, exit code 76;"
            " the repeated command continues",
            "the shard that was being encoded",
        )
    )


# torchrun, which gives a rank that SIGTERM does not end 5 s instead of 30 before it sends SIGKILL.
TORCHRUN = """
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main
death_signal, _ = PContext.close.__defaults__
PContext.close.__defaults__ = (death_signal, 5)
main()
"""


def test_a_rank_that_freezes_in_encode_under_torchrun_is_named(tmp_path):
    """There the launcher keeps the store, and ends the frozen rank."""
    source, out = images(tmp_path / "images"), tmp_path / "latents"
    words = ["encode", "--images", str(source), "--autoencoder", "none", "--resolution", "8", "--out", str(out)]
    words += ["--shard-size", "4", "--step-timeout", "4"]
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from support.hanging import *;"
    program += " hang_in(1, 'megapromoe.data.encode:_write_shard', freeze, 2)"
    command = [sys.executable, "-c", TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", program, str(Path(__file__).parents[1]), *words]
    with open(tmp_path / "output-0", "wb") as output:
        job = subprocess.Popen(command, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT)
    STARTED.append(job)
    assert end_of([job], tmp_path) == [1]
    text = output_of(tmp_path, 0)
    assert re.search(
        r"no progress for \d+ s \(--step-timeout = 4\) in .*; silent: rank 1, last in shard [24] of 6", text
    )
    assert re.search(r"exitcode\s*:\s*76", text), text
