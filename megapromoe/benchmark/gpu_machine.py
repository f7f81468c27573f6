"""Describes the machine of a GPU run in a separate process, so that no memory of the GPU stays allocated.

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

# Fields that nvidia-smi reports for each GPU besides its name and driver.
GPU_FACTS = ("memory.total", "clocks.max.sm", "clocks.sm", "power.limit", "power.draw", "temperature.gpu")
IDENTITY = ("device", "gpus", "cuda", "python", "torch", "deepspeed")  # equal for all results of one folder


class GpuRunError(UserError):
    """The GPU run cannot start with this command line."""

    exit_code = ExitCode.MISCONFIGURED


def describe(device: str) -> dict[str, Any]:
    """Device, versions, and nvidia-smi's report of driver, clock and power if it is installed.

    Args:
        device: cuda or cpu.

    Raises GpuRunError if torch finds no GPU, or if DeepSpeed is not installed.
    """
    import torch  # takes seconds to import

    from megapromoe.preflight.machine import query_gpus, versions

    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise GpuRunError("--device cuda: torch finds no GPU here; to test the program use --device cpu --quick")
    installed = versions()
    if installed["deepspeed"] == "not installed":
        raise GpuRunError("DeepSpeed is not installed; collect wheels by `gpu_run.py wheels` and pass --wheels DIR")
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "cuda": torch.version.cuda if gpu else None,
        **{name: installed[name] for name in ("python", "torch", "deepspeed", "megapromoe")},
        "cores": os.cpu_count(),
        "nvidia_smi": query_gpus(GPU_FACTS),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def check_machine(out: Path, device: str, environment: dict[str, str]) -> dict[str, Any]:
    """Describes the machine, and writes machine.json into the folder of the run.

    Raises GpuRunError if the machine cannot run the stages, or if the folder has results of another machine.
    """
    words = [sys.executable, "-m", __name__, device]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GpuRunError(lines[-1])
    machine, file = json.loads(done.stdout), out / "machine.json"
    if file.is_file():
        saved = read_json(file)
        changes = [f"{k}: {saved.get(k)!r}, now {machine[k]!r}" for k in IDENTITY if saved.get(k) != machine[k]]
        if changes:
            raise GpuRunError(f"{out}: has results of another machine ({'; '.join(changes)}); use another --out")
    write_json(file, machine, indent=1)
    return machine


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises GpuRunError if the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise GpuRunError(f"{file}: is damaged ({error}); remove it, or use another --out") from error
    return content


if __name__ == "__main__":
    try:
        print(json.dumps(describe(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
