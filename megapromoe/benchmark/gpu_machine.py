"""The machine of a GPU run, described by a process of its own, which leaves nothing on the GPU.

python -m megapromoe.benchmark.gpu_machine cuda
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megapromoe.errors import ExitCode, UserError
from megapromoe.io import write_json

# What nvidia-smi is asked of each GPU, beside its name and driver.
GPU_FACTS = ("memory.total", "clocks.max.sm", "clocks.sm", "power.limit", "power.draw", "temperature.gpu")
IDENTITY = ("device", "gpus", "cuda", "python", "torch", "deepspeed")  # what figures of one folder have in common


class GpuRunError(UserError):
    """A GPU run that cannot start as the command line asks for."""

    exit_code = ExitCode.MISCONFIGURED


def describe(device: str) -> dict[str, Any]:
    """Device, versions, and what nvidia-smi reports of driver, clock and power, where there is one.

    Raises GpuRunError where torch finds no GPU, or DeepSpeed is not installed.
    """
    import torch  # takes seconds to import

    from megapromoe.preflight.machine import ask_gpus, versions

    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise GpuRunError("--device cuda: torch finds no GPU here; try the program with --device cpu --quick")
    found = versions()
    if found["deepspeed"] == "not installed":
        raise GpuRunError("DeepSpeed is not installed; collect it by `gpu_run.py wheels`, and give --wheels")
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "cuda": torch.version.cuda if gpu else None,
        **{name: found[name] for name in ("python", "torch", "deepspeed", "megapromoe")},
        "cores": os.cpu_count(),
        "nvidia_smi": ask_gpus(GPU_FACTS),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def check_machine(out: Path, device: str, environment: dict[str, str]) -> dict[str, Any]:
    """Describes the machine, and writes machine.json into the folder of the run.

    Raises GpuRunError where the machine cannot run the stages, or the folder holds figures of another machine.
    """
    words = [sys.executable, "-m", __name__, device]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GpuRunError(lines[-1])
    machine, file = json.loads(done.stdout), out / "machine.json"
    if file.is_file():
        held = read_json(file)
        differ = [f"{k}: {held.get(k)!r}, now {machine[k]!r}" for k in IDENTITY if held.get(k) != machine[k]]
        if differ:
            raise GpuRunError(f"{out}: holds figures of another machine ({'; '.join(differ)}); give another --out")
    write_json(file, machine, indent=1)
    return machine


def read_json(file: Path) -> dict[str, Any]:
    """An object in a JSON file of a run's folder. Raises GpuRunError if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise GpuRunError(f"{file}: is damaged ({error}); remove it, or give another --out") from error
    return content


if __name__ == "__main__":
    try:
        print(json.dumps(describe(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
