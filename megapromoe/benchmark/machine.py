"""The machine of a measurement, and its measured peak of matrix products, to which shares of the peak refer."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch

from megapromoe.benchmark.measure import Work, interleave, make_clock
from megapromoe.versions import versions

SIDES = {"cpu": (512, 1024, 1536), "cuda": (4096, 8192, 16384)}
ROUNDS = {"cpu": 5, "cuda": 20}
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def matmul_peak(device: torch.device, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """The measured FLOP/s of the fastest of a few square matrix products, best round.

    Returns `flop_per_second` and the `side` of the matrices.
    """
    works = {str(side): _product(side, device, dtype) for side in SIDES[device.type]}
    samples = interleave(works, ROUNDS[device.type], make_clock(device, threads), warmup=2)
    rate, side = max((2 * side**3 / min(samples[str(side)]["product"]), side) for side in SIDES[device.type])
    return {"flop_per_second": rate, "side": side}


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Work:
    """A product of two square matrices into a third."""
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=out)

    return Work({"product": run})


def keep_memory() -> bool:
    """Makes the C library keep freed memory until this process ends; returns whether it does.

    By default glibc returns large blocks to the system and gets them back page by page, at irregular times. That can
    take as long as the products of a small layer. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def describe(device: torch.device, dtype: torch.dtype, threads: int, kept: bool) -> dict[str, Any]:
    """Device, versions, threads, load of the machine before the measurement, and the measured peak.

    `kept`: the result of `keep_memory`.
    """
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "kind": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "dtype": str(dtype).removeprefix("torch."),
        "clock": "CUDA events" if gpu else "process time" if threads == 1 else "wall",
        "memory": "kept when freed" if kept else "as the allocator has it",
        "peak": matmul_peak(device, dtype, threads),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions(("megapromoe", "deepspeed")),
        "cuda": torch.version.cuda if gpu else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
