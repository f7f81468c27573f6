"""Runs the stages of a GPU run: each process with its share of the time limit and its own log."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.benchmark.gpu_machine import GpuRunError, read_json
from megapromoe.benchmark.gpu_stages import STAGES, StageCommand, stage_figures
from megapromoe.io import open_regular, write_json

RUN_SHARE, STOP_SHARE = 0.94, 0.05  # of the limit of a stage: for its processes, and for them to end after the signal
LOG_LINES = 15  # last lines of a log, shown when its process ends


@dataclass(frozen=True)
class Outcome:
    """How a process ended: status `finished`, `stopped` by its limit, or `failed`; exit code; duration in seconds."""

    status: str
    exit_code: int
    seconds: float


@dataclass(frozen=True)
class GpuRun:
    """A run of stages with its results in one folder.

    Args:
        out: the folder; `out / stage` is that of a stage.
        root: the checkout.
        seconds: time limit of each stage.
        environment: of the stages' processes.
        machine: result of `gpu_machine.describe`.
    """

    out: Path
    root: Path
    seconds: float
    environment: dict[str, str]
    machine: dict[str, Any]

    def commands_done(self, stage: str, commands: Sequence[StageCommand]) -> dict[str, Any]:
        """The recorded outcomes of the processes of a stage: name -> outcome.

        Raises GpuRunError if the folder has results of other command lines.
        """
        file = self.out / stage / "stage.json"
        done = read_json(file)["commands"] if file.is_file() else {}
        words = {command.name: self._recorded(command) for command in commands}
        if any(done[name]["words"] != words.get(name) for name in done):
            raise GpuRunError(
                f"{self.out / stage}: has results of other command lines; use another --out, or --again to remove them"
            )
        return done

    def discard(self, stage: str) -> None:
        """Removes the folder of a stage, if it has results."""
        if (self.out / stage / "stage.json").is_file():
            shutil.rmtree(self.out / stage)

    def run_stage(self, stage: str, commands: Sequence[StageCommand]) -> str:
        """Runs the unfinished processes of a stage, writes stage.json after each, and returns the stage's status."""
        folder, done, status = self.out / stage, self.commands_done(stage, commands), "finished"
        remaining = [c for c in commands if done.get(c.name, {}).get("status") != "finished"]
        if not remaining:
            print(f"{stage}: finished before, skipped; use --again to repeat it", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + RUN_SHARE * self.seconds
        for number, command in enumerate(remaining):
            # Time that a process does not use is divided among the next.
            limit = max(deadline - time.monotonic(), 0.0) / (len(remaining) - number)
            log, grace = folder / f"{command.name}.log", STOP_SHARE * self.seconds / len(remaining)
            print(f"{stage}, {command.name}: at most {limit / 60:.1f} min, log in {log}", flush=True)
            outcome = run_process(command, self.environment, self.root, log, limit, grace)
            version = self.machine["megapromoe"]
            done[command.name] = {"words": self._recorded(command), **vars(outcome), "megapromoe": version}
            statuses = [done.get(c.name, {}).get("status", "stopped") for c in commands]
            status = next((s for s in ("failed", "stopped") if s in statuses), "finished")
            write_json(folder / "stage.json", {"stage": stage, "status": status, "commands": done}, indent=1)
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join(f"    {line}" for line in tail))
            print(f"{stage}, {command.name}: {outcome.status} after {outcome.seconds / 60:.1f} min", flush=True)
        return status

    def _recorded(self, command: StageCommand) -> list[str]:
        """A command line without its variable parts: the folder, which may be moved, and the time limit."""
        words = [word.replace(str(self.out), "OUT") for word in command.words]
        if "--seconds" in words:
            index = words.index("--seconds")
            del words[index : index + 2]
        return words

    def report(self) -> str:
        """The machine and the results of all stages so far, as Markdown."""
        facts = ("device", "capability", "gpus", "cuda", "python", "torch", "deepspeed", "megapromoe", "cores")
        machine = [f"{name} {self.machine[name]}" for name in facts if self.machine[name] is not None]
        lines = ["# GPU run", "", ", ".join(machine), ""]
        for row in self.machine["nvidia_smi"]:
            lines.append(f"* {', '.join(f'{name} {value}' for name, value in row.items() if name != 'uuid')}")
        for stage in STAGES:
            file = self.out / stage / "stage.json"
            if file.is_file():
                saved = read_json(file)
                seconds = sum(command["seconds"] for command in saved["commands"].values())
                lines += ["", f"## {stage}: {saved['status']}, {seconds / 60:.1f} min", ""]
                lines += [f"* {line}" for line in stage_figures(stage, file.parent)]
        return "\n".join(lines) + "\n"


def run_process(
    command: StageCommand, environment: dict[str, str], root: Path, log: Path, limit: float, grace: float
) -> Outcome:
    """Runs a process, and appends its output to `log`.

    Args:
        command: the process.
        environment: of the process.
        root: its working folder.
        log: file for its output.
        limit: seconds after which it gets the signal `command.stop`, on which it saves its results and ends.
        grace: seconds between that signal and killing the process and its children.
    """
    start = time.monotonic()
    with open(open_regular(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output:
        output.write(f"$ {shlex.join(command.words)}\n".encode())
        output.flush()
        # A new session, so that Ctrl-C is not delivered to it twice and its children can be killed with it.
        process = subprocess.Popen(
            [sys.executable, *command.words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=root,
            env={**environment, **dict(command.settings)},
            start_new_session=True,
        )
        stopped = False
        try:
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                stopped = True
                process.send_signal(command.stop)
                try:
                    process.wait(grace)
                except subprocess.TimeoutExpired:
                    output.write(b"gpu_run: did not end after the signal, killed\n")
        except KeyboardInterrupt:
            process.send_signal(command.stop)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            raise
        finally:
            _kill_group(process)
    code = process.returncode
    status = "finished" if code == 0 else "stopped" if stopped else "failed"
    return Outcome(status, code, time.monotonic() - start)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children, if they still run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
