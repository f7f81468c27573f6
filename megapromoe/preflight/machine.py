"""What one rank finds on its machine: versions, a device that multiplies rightly and fast enough, and room to work."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

import megapromoe
from megapromoe.config.deepspeed_file import find_ds_configs
from megapromoe.distributed import runtime
from megapromoe.preflight import topology
from megapromoe.preflight.verdict import FAIL, WARN
from megapromoe.versions import versions as package_versions

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")

# What nvidia-smi is asked of each GPU, and the answers that are worth a line: verdict, meaning, remedy.
_RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset), or replace it"
GPU_FACTS = {
    "ecc.errors.uncorrected.volatile.total": (FAIL, "uncorrected memory errors", _RESET),
    "remapped_rows.failure": (FAIL, "memory rows that could not be remapped", "replace the GPU"),
    "remapped_rows.pending": (WARN, "memory rows to be remapped", _RESET),
    "retired_pages.pending": (WARN, "memory pages to be retired", _RESET),
    "clocks_throttle_reasons.hw_slowdown": (WARN, "slowed down by heat or power", "see to its cooling and power"),
}
# What is wrong with the installation, wherever it runs: parts of `no_gpu`, and of the error of a first product.
WITHOUT_CUDA = "built without CUDA"
SETUP_FAULTS = (WITHOUT_CUDA, "driver on your system is too old", "no kernel image is available")


@dataclass(frozen=True)
class Machine:
    """What a rank found. Bytes, except `teraflops` of the device and `wrong`, rows of its product that were not exact.

    `error` is why the device could not be tried. `gpus` is what nvidia-smi says, on the first rank of a node. `no_gpu`
    is why torch uses no GPU. `locked_memory` is a limit, -1 if there is none, and `rdma` whether the node has an
    adapter that needs such memory. `gpu_numa` is the NUMA node of this rank's GPU, -1 if unknown; `core_numa` are those
    of the cores that it may use.
    """

    versions: dict[str, str]
    device: str
    name: str
    uuid: str
    memory: int
    free: int
    wrong: int
    teraflops: float
    error: str
    host_memory: int
    host_available: int
    shared_memory: int
    open_files: int
    cpus: int
    settings: dict[str, str] = field(default_factory=dict)
    gpus: list[dict[str, str]] = field(default_factory=list)
    no_gpu: str = ""
    locked_memory: int = -1
    rdma: bool = False
    gpu_numa: int = -1
    core_numa: list[int] = field(default_factory=list)


def examine(launch: runtime.Launch, leader: bool) -> Machine:
    """Looks at this rank's machine and tries its device; needs no other rank."""
    gpus = ask_gpus() if leader else []
    host = _memory_of_host()
    name, uuid, memory, free = platform.machine(), "", host["MemTotal"], host["MemAvailable"]
    wrong, teraflops, error, kind, gpu_numa = 0, 0.0, "", "none", -1
    try:
        device = runtime.device_of(launch)
        kind = device.type
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(device)
            free, memory = torch.cuda.mem_get_info(device)
            name, uuid = properties.name, str(properties.uuid)
            gpu_numa = topology.numa_of_gpu(topology.pci_address(properties))
        wrong, teraflops = try_product(device)
    except RuntimeError as problem:  # what CUDA raises, out of memory included
        error = str(problem).splitlines()[0]
    return Machine(
        versions=versions() | ({"driver": gpus[0]["driver_version"]} if gpus else {}),
        device=kind,
        name=name,
        uuid=uuid,
        memory=memory,
        free=free,
        wrong=wrong,
        teraflops=teraflops,
        error=error,
        host_memory=host["MemTotal"],
        host_available=host["MemAvailable"],
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        cpus=os.cpu_count() or 1,
        settings=runtime.settings(),
        gpus=gpus,
        no_gpu=why_no_gpu(),
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        rdma=topology.has_rdma(),
        gpu_numa=gpu_numa,
        core_numa=topology.numa_of_cores(os.sched_getaffinity(0)),
    )


def why_no_gpu() -> str:
    """Why torch uses no GPU, in a sentence; "" if it does."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is {WITHOUT_CUDA}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no device is visible"


def versions() -> dict[str, str]:
    """Versions of all that must be the same everywhere; of megapromoe also a hash of what is installed."""
    found = {"python": platform.python_version(), **package_versions(PACKAGES)}
    found["CUDA"] = torch.version.cuda or "none"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    found["megapromoe"] = f"{megapromoe.__version__} {content_hash()}"
    return found


def content_hash() -> str:
    """Twelve digits of a hash over the package's code and DeepSpeed files; an installed copy knows no commit."""
    root = Path(megapromoe.__file__).parent
    total = hashlib.sha256()
    for folder, pattern in ((root, "*.py"), (find_ds_configs(), "*.json")):
        for file in sorted(folder.rglob(pattern)):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()[:12]


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def try_product(device: torch.device, seed: int = 0) -> tuple[int, float]:
    """Rows that the device gets wrong in repeated matrix products, and its TFLOP/s (bf16; fp32 on a CPU).

    The entries are +-1 and an inner size of 1024 keeps every partial sum far below 256, so that bf16 and any order of
    summation are exact: one wrong bit is a fault, not rounding. The host checks, without a product of its own, that
    C x = A (B x) for random x, in whole numbers; 32 of them let a wrong row through once in 2^32.
    """
    cuda = device.type == "cuda"
    n, inner, repeats, warm = (8192, 1024, 400, 50) if cuda else (1024, 1024, 3, 0)
    draw = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 2, (n, inner), generator=draw).mul_(2).sub_(1)
    b = torch.randint(0, 2, (inner, n), generator=draw).mul_(2).sub_(1)
    x = torch.randint(0, 2, (n, 32), generator=draw).mul_(2).sub_(1).double()
    expected = a.double() @ (b.double() @ x)

    kind = torch.bfloat16 if cuda else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranks of a node do this at the same time
    try:
        on_a, on_b = a.to(device, kind), b.to(device, kind)
        products = [multiply(on_a, on_b)]
        for _ in range(warm):  # clocks rise under load
            multiply(on_a, on_b)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            last = multiply(on_a, on_b)
        synchronize(device)
        seconds = time.perf_counter() - start
        products.append(last)
        wrong = 0
        for product in products:
            on_host = product.cpu()
            found = torch.cat([part.double() @ x for part in on_host.split(1024)])
            wrong = max(wrong, int((found != expected).any(1).sum()))  # also of NaN
        return wrong, 2 * n * n * inner * repeats / seconds / 1e12
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was enqueued; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ask_gpus(facts: Collection[str] = tuple(GPU_FACTS)) -> list[dict[str, str]]:
    """What nvidia-smi says of every GPU of the node; empty where there is no nvidia-smi, or it does not answer.

    Args:
        facts: what to ask beside index, uuid, name and driver; those that this driver does not know are left out.
    """
    program = shutil.which("nvidia-smi")
    names = ["index", "uuid", "name", "driver_version", *facts]
    while program and names:
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode == 0:
            rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
            return [dict(zip(names, map(str.strip, row), strict=True)) for row in rows if len(row) == len(names)]
        # Older and newer drivers do not know all names.
        unknown = re.search(r'Field "([^"]+)" is not a valid field', done.stdout + done.stderr)
        if unknown is None or unknown[1] not in facts or unknown[1] not in names:
            return []
        names.remove(unknown[1])
    return []


def _memory_of_host() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {name: sizes.get(name, 0) for name in ("MemTotal", "MemAvailable")}


def cannot_join(found: dict[int, Machine], node_of: dict[int, str]) -> str:
    """Why these ranks' devices cannot be tried together, in a collective; "" if they can."""
    owners: dict[tuple[str, str], int] = {}
    for rank, machine in found.items():
        if machine.error:
            return f"not tried: the device of rank {rank} fails by itself"
        if machine.device != found[min(found)].device:
            return f"not tried: rank {rank} has a {machine.device} device, rank {min(found)} another"
        if machine.uuid and (other := owners.setdefault((node_of[rank], machine.uuid), rank)) != rank:
            return f"not tried: ranks {other} and {rank} share a GPU"
    return ""
