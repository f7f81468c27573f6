"""launchers/torchrun.sh on two nodes: network namespaces of this machine with a link that is cut and comes back."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.network_namespaces import ADDRESSES, INTERFACE, set_link, two_namespaces, why_not
from support.training_runs import losses

from megapromoe.checkpoint.step_folders import steps_in

ROOT = Path(__file__).parents[2]
THEIRS = ("SLURM", "TORCHELASTIC", "PET_", "SKYPILOT", "NNODES", "MIN_NODES", "NODE_", "MASTER", "RETRIES", "PREFLIGHT")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(THEIRS)}
# The batch is so large that a fast machine does few steps: differences of rounding grow with their number.
TINY = ["digits", "train.log_every=1", "train.save_every=5", "train.keep_last=2", "train.global_batch=64",
        "train.schedule=constant", "train.warmup=4", "model.hidden_size=32", "model.depth=2"]  # fmt: skip
LIMIT = 4  # train.step_timeout, seconds
NODE_WAIT = 15
BOUND = 240.0  # seconds for each thing to happen, on a busy machine


class Launchers:
    """torchrun.sh with one rank on each of two nodes; their output."""

    def __init__(self, nodes: list[str], folder: Path, *words: str, **variables: str):
        self.run, self.folder = folder / "run", folder
        env = CLEAN | {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29521", "NPROC": "1", "NNODES": "1:2"}
        env |= {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "RUN_DIR": str(self.run), "PREFLIGHT": "0"}
        env |= {"NODE_CACHE": str(folder / "cache"), "MEGAPROMOE_PYTHON": sys.executable, **variables}
        launcher = ["bash", str(ROOT / "launchers" / "torchrun.sh"), *TINY, f"train.step_timeout={LIMIT}", *words]
        self.processes = []
        for node, name in enumerate(nodes):
            with open(folder / f"output-{node}", "wb") as output:
                command = ["ip", "netns", "exec", name, *launcher]
                self.processes.append(
                    subprocess.Popen(
                        command, env=env | {"NODE_RANK": str(node)}, stdout=output, stderr=output, cwd=folder,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def output(self, node: int) -> str:
        return (self.folder / f"output-{node}").read_text()

    def steps(self) -> int:
        file = self.run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_until(self, condition, what: str, limit: float = BOUND) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.output(0)[-6000:]}\n====\n{self.output(1)[-6000:]}"
            time.sleep(0.05)

    def attempts(self, node: int) -> list[list[str]]:
        file = self.run / "logs" / f"attempts-node{node}.tsv"
        return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []

    def starts(self, node: int, count: int) -> int:
        """How many attempts have begun on so many of the two nodes."""
        return len(re.findall(rf"^nodes of this attempt: .*; {count} of 2$", self.output(node), re.M))

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def start(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    started = []
    with two_namespaces() as nodes:

        def start(*words: str, **variables: str) -> Launchers:
            started.append(Launchers(nodes, tmp_path, *words, **variables))
            return started[-1]

        start.nodes = nodes
        yield start
        for launchers in started:
            launchers.end()


@pytest.mark.full
def test_a_node_that_is_cut_off_is_named_the_job_goes_on_without_it_and_takes_it_back(start, tmp_path, fault_table):
    job = start("train.steps=1000000", NODE_WAIT=str(NODE_WAIT), NODE_TIMEOUT="300")
    job.wait_until(lambda: len(steps_in(job.run / "checkpoints")) >= 2, "two checkpoints on two nodes")
    set_link(start.nodes[1], "down")
    cut_at, cut = job.steps(), time.monotonic()
    job.wait_until(lambda: job.starts(0, 1) == 1, "an attempt on one node")
    resumed = time.monotonic() - cut
    job.wait_until(lambda: job.steps() >= cut_at + 30, "steps on one node")
    named = r"rank 0: no progress for \d+ s .*; silent: rank 1, last in section"
    assert re.search(named, job.output(0)), job.output(0)[-6000:]
    (lost,) = job.attempts(0)
    assert lost[2] == "76", "torchrun would return 1"
    (newest,) = re.findall(r"resumes from step (\d+)", job.output(0))

    set_link(start.nodes[1], "up")
    before = job.starts(1, 2)
    job.wait_until(lambda: job.starts(1, 2) == before + 1, "both nodes again")
    both_at = job.steps()
    job.wait_until(lambda: job.steps() >= both_at + 5, "steps on two nodes")
    assert "another node can take part: the job saves and goes on with it" in job.output(0)
    assert [attempt[2] for attempt in job.attempts(0)] == ["76", "75"]

    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    job.wait_until(lambda: all(process.poll() is not None for process in job.processes), "the end")
    assert [process.returncode for process in job.processes] == [75, 75], job.output(0)[-3000:] + job.output(1)[-3000:]
    done = job.steps()
    assert steps_in(job.run / "checkpoints")[-1] == done, "saved after the last step"

    # The same steps in one process: the batch is the same on one node and on two.
    words = [sys.executable, "-m", "megapromoe", "train", "--preset", *TINY, f"train.steps={done}"]
    words += ["train.save_every=0", "train.deepspeed=fp32_zero1", "--run-dir", str(tmp_path / "undisturbed")]
    subprocess.run(words, env=CLEAN | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=BOUND)
    assert losses(job.run) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
    fault_table.append(
        (
            "a node of torchrun.sh is cut off from the network, and comes back",
            "the node is named, the job goes on with the others, and takes the node back",
            f"{resumed:.0f} s (of which {LIMIT} s time-out and {NODE_WAIT} s of waiting for the node), and the"
            f" {max(cut_at - int(newest), 0)} steps since the last save; nothing when it comes back",
        )
    )
