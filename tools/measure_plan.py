"""Compares a calibrated plan with measured steps on this machine; `--help` explains it."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401  # makes the package importable

# Name -> ranks and settings. The first ones calibrate, the others are predicted.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one-32": (1, ("train.global_batch=32",)),
    "one-128": (1, ("train.global_batch=128",)),
    "two-64": (2, ("train.global_batch=64",)),
    "two-64-ep": (2, ("train.global_batch=64", "parallel.ep=2")),
    "two-256": (2, ("train.global_batch=256",)),
}
EPILOG = """\
Trains the preset digits in one and in two processes of one thread each, and checks two processes. The runs take turns
of some seconds, in which the others are stopped (SIGSTOP), so that a change of the machine's load affects all of them;
steps that a stop interrupted are left out. Then `megapromoe plan` is calibrated with the check and some of the runs, by
default all but the larger batch and expert parallelism of two processes, and prints all others as predictions.
Everything is kept in --out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", metavar="N", type=int, default=60, help="steps to measure of each run; default: 60")
    parser.add_argument("--turn", metavar="SECONDS", type=float, default=4.0, help="seconds of a turn; default: 4")
    parser.add_argument("--minutes", metavar="N", type=float, default=20.0, help="give up after; default: 20")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        choices=("check", *RUNS),
        default=["check", "one-32", "one-128", "two-64"],
        help="what the plan is calibrated with; default: check one-32 one-128 two-64",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    deadline = time.monotonic() + 60 * options.minutes
    words = ["check", "--preset", "digits", "--report", str(options.out / "check.json")]
    check = Job(2, words, options.out / "check.log")
    try:
        while not check.ended():
            pause(deadline)
    finally:
        check.kill()
    measure(options.out, options.steps, options.turn, deadline)
    plan = [sys.executable, "-m", "megapromoe", "plan", *compared(options.out, options.calibrate)]
    return subprocess.run(plan).returncode


def compared(out: Path, calibrate: list[str]) -> list[str]:
    """The options of `megapromoe plan` that calibrate with some of the measurements and predict the other runs."""
    paths = {name: str(out / ("check.json" if name == "check" else name)) for name in ("check", *RUNS)}
    words = ["--gpu", "cpu", "--preset", "digits", "--measured", *(paths[name] for name in calibrate)]
    predicted = [paths[name] for name in RUNS if name not in calibrate]
    return [*words, "--validate", *predicted] if predicted else words


class Job:
    """The ranks of a `megapromoe` command, of one thread each, that can be stopped and continued together."""

    def __init__(self, ranks: int, words: list[str], log: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "megapromoe", *words]
            with log.with_suffix(f".{rank}.log").open("wb") as file:
                self.processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
                )

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def ended(self) -> bool:
        """Whether all ranks have ended. Raises CalledProcessError if one failed."""
        for process in self.processes:
            if process.poll():
                raise subprocess.CalledProcessError(process.returncode, process.args)
        return all(process.returncode == 0 for process in self.processes)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def measure(out: Path, steps: int, seconds: float, deadline: float) -> None:
    """Trains all runs in turns until each has logged `steps` steps. Raises TimeoutError at the deadline."""
    jobs: dict[str, Job] = {}
    try:
        for name, (ranks, settings) in RUNS.items():
            words = ["train", "--preset", "digits", "--run-dir", str(out / name), *settings]
            # Many steps, so that TensorBoard's heat maps, about 20 in a run, are no part of the measured ones.
            words += ["train.steps=1000000", "train.log_every=1", "train.save_every=0", "train.warmup=0"]
            jobs[name] = Job(ranks, words, out / f"{name}.log")
            while num_steps(out / name) < 2 and not jobs[name].ended():
                pause(deadline)
            jobs[name].signal(signal.SIGSTOP)
        continued: dict[str, list[float]] = {name: [] for name in RUNS}
        while any(num_steps(out / name) < steps + 2 for name in RUNS):  # all go on, so that all have the same load
            for name in RUNS:
                continued[name].append(time.time())
                jobs[name].signal(signal.SIGCONT)
                end = time.monotonic() + seconds
                while time.monotonic() < end and not jobs[name].ended():
                    pause(deadline)
                jobs[name].signal(signal.SIGSTOP)
            counts = ", ".join(f"{name} {num_steps(out / name)}" for name in RUNS)
            print(f"load {os.getloadavg()[0]:.1f}; steps: {counts}", flush=True)
    finally:
        for job in jobs.values():
            job.kill()
    for name, times in continued.items():
        remove_interrupted(out / name / "metrics.jsonl", times)


def remove_interrupted(file: Path, continued: list[float]) -> None:
    """Removes the lines of the steps during which a run was stopped.

    Args:
        continued: seconds since 1970 at which it was continued.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    before = [0.0, *(line["wall_time"] for line in lines)]
    kept = [
        line
        for line, start in zip(lines, before, strict=False)
        if not any(start < moment <= line["wall_time"] for moment in continued)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))


def pause(deadline: float) -> None:
    """Sleeps a moment. Raises TimeoutError after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError("too few steps until the deadline; give more --minutes, or a machine with less load")
    time.sleep(0.05)


def num_steps(run: Path) -> int:
    """Number of the steps that a run has logged."""
    file = run / "metrics.jsonl"
    return sum(json.loads(line)["step"] > 0 for line in file.read_text().splitlines()) if file.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
