"""Checks of one rank's machine: versions, correctness and speed of its device, memory, limits and settings."""

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

# Fields of `nvidia-smi --query-gpu` whose non-zero values are reported: verdict, meaning, remedy.
_RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset), or replace it"
GPU_HEALTH_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": (FAIL, "uncorrected memory errors", _RESET),
    "remapped_rows.failure": (FAIL, "memory rows that could not be remapped", "replace the GPU"),
    "remapped_rows.pending": (WARN, "memory rows to be remapped", _RESET),
    "retired_pages.pending": (WARN, "memory pages to be retired", _RESET),
    "clocks_throttle_reasons.hw_slowdown": (WARN, "slowed down by heat or power", "check its cooling and power supply"),
}
# Parts of `Machine.no_gpu` and of `Machine.error` that show a fault of the installation and not of one node.
WITHOUT_CUDA = "built without CUDA"
SETUP_FAULTS = (WITHOUT_CUDA, "driver on your system is too old", "no kernel image is available")


@dataclass(frozen=True)
class Machine:
    """The findings of one rank about its machine. All sizes are in bytes.

    Attributes:
        versions: name -> version of everything that must be the same on all nodes.
        device, name, uuid: type, product name and UUID of the device.
        memory, free: total and free device memory.
        wrong: rows of the matrix product that are not exact.
        teraflops: speed of the matrix product.
        error: why the device could not be checked; "" if it could.
        host_memory, host_available, shared_memory: memory of the node, what of it is available, and of /dev/shm.
        open_files: limit on open files.
        cpus: cores of the node.
        settings: environment variables that change NCCL, CUDA or OpenMP.
        gpus: what nvidia-smi reports for each GPU, on the first rank of a node only.
        no_gpu: why torch uses no GPU; "" if it does.
        locked_memory: limit on locked memory; -1: unlimited.
        rdma: whether the node has an RDMA adapter, which needs locked memory.
        gpu_numa: NUMA node of this rank's GPU; -1 if unknown.
        core_numa: NUMA nodes of the cores that this rank may use.
        elementwise: bytes per second that an elementwise kernel reads and writes.
        launch: seconds of the host to launch a small kernel; on a CPU to run a small operator.
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
    elementwise: float = 0.0
    launch: float = 0.0


def examine(launch: runtime.LaunchEnvironment, leader: bool) -> Machine:
    """Collects the findings about this rank's machine. Needs no other rank.

    Args:
        leader: whether this is the first rank of its node, which also queries nvidia-smi.
    """
    gpus = query_gpus() if leader else []
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
        wrong, teraflops = check_matmul(device)
    except RuntimeError as problem:  # all errors of CUDA, out of memory included
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
        no_gpu=reason_for_no_gpu(),
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        rdma=topology.has_rdma(),
        gpu_numa=gpu_numa,
        core_numa=topology.numa_of_cores(os.sched_getaffinity(0)),
    )


def reason_for_no_gpu() -> str:
    """Why torch uses no GPU, for a message; "" if it uses one."""
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
    """Versions of everything that must be the same on all nodes; for megapromoe also a hash of the installed files."""
    result = {"python": platform.python_version(), **package_versions(PACKAGES)}
    result["CUDA"] = torch.version.cuda or "none"
    result["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    result["megapromoe"] = f"{megapromoe.__version__} {content_hash()}"
    return result


def content_hash() -> str:
    """The first twelve hexadecimal digits of a SHA-256 over the package's Python and DeepSpeed configuration files.

    It identifies the code where there is no git repository, as in an installed package.
    """
    root = Path(megapromoe.__file__).parent
    total = hashlib.sha256()
    for folder, pattern in ((root, "*.py"), (find_ds_configs(), "*.json")):
        for file in sorted(folder.rglob(pattern)):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()[:12]


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b; a function of its own so that tests can put a faulty device in its place."""
    return a @ b


def check_matmul(device: torch.device, seed: int = 0) -> tuple[int, float]:
    """Checks repeated matrix products on the device and measures their speed (bf16; fp32 on a CPU).

    The entries are ±1, and with an inner size of 1024 the partial sums stay far below 256. So bf16 is exact in any
    order of summation, and a single wrong bit is a fault and not rounding. The host checks C x = A (B x) for 32 random
    vectors x of ±1 (Freivalds' algorithm), which needs no full matrix product and misses a wrong row with probability
    2^-32.

    Returns:
        The number of wrong rows, and TFLOP/s.
    """
    cuda = device.type == "cuda"
    n, inner, repeats, warm = (8192, 1024, 400, 50) if cuda else (1024, 1024, 3, 0)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 2, (n, inner), generator=generator).mul_(2).sub_(1)
    b = torch.randint(0, 2, (inner, n), generator=generator).mul_(2).sub_(1)
    x = torch.randint(0, 2, (n, 32), generator=generator).mul_(2).sub_(1).double()
    expected = a.double() @ (b.double() @ x)

    dtype = torch.bfloat16 if cuda else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all ranks of a node measure at the same time
    try:
        device_a, device_b = a.to(device, dtype), b.to(device, dtype)
        products = [multiply(device_a, device_b)]
        for _ in range(warm):  # a GPU raises its clocks under load
            multiply(device_a, device_b)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            last = multiply(device_a, device_b)
        synchronize(device)
        seconds = time.perf_counter() - start
        products.append(last)
        wrong = 0
        for product in products:
            result = torch.cat([part.double() @ x for part in product.cpu().split(1024)])
            wrong = max(wrong, int((result != expected).any(1).sum()))  # NaN counts as wrong too
        return wrong, 2 * n * n * inner * repeats / seconds / 1e12
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Waits until the device has completed all enqueued work; returns at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def query_gpus(fields: Collection[str] = tuple(GPU_HEALTH_FIELDS)) -> list[dict[str, str]]:
    """Queries nvidia-smi for every GPU of the node; an empty list if nvidia-smi is missing or fails.

    Args:
        fields: fields beside index, uuid, name and driver version; fields that the driver does not know are omitted.
    """
    program = shutil.which("nvidia-smi")
    names = ["index", "uuid", "name", "driver_version", *fields]
    while program and names:
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode == 0:
            rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
            return [dict(zip(names, map(str.strip, row), strict=True)) for row in rows if len(row) == len(names)]
        # Not every driver version knows every field: repeat the query without the unknown one.
        unknown = re.search(r'Field "([^"]+)" is not a valid field', done.stdout + done.stderr)
        if unknown is None or unknown[1] not in fields or unknown[1] not in names:
            return []
        names.remove(unknown[1])
    return []


def _memory_of_host() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {name: sizes.get(name, 0) for name in ("MemTotal", "MemAvailable")}


def reason_to_skip_network(machines: dict[int, Machine], node_of: dict[int, str]) -> str:
    """Why collectives between these ranks cannot be checked; "" if they can."""
    first = min(machines, default=0)
    owners: dict[tuple[str, str], int] = {}
    for rank, machine in machines.items():
        if machine.error:
            return f"not checked: the device of rank {rank} fails without any communication"
        if machine.device != machines[first].device:
            return (
                f"not checked: rank {rank} has a {machine.device} device, rank {first} a {machines[first].device} one"
            )
        if machine.uuid and (other := owners.setdefault((node_of[rank], machine.uuid), rank)) != rank:
            return f"not checked: ranks {other} and {rank} share a GPU"
    return ""
