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
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import megapromoe
from megapromoe.config.deepspeed_file import find_ds_configs
from megapromoe.distributed import runtime
from megapromoe.planning.machines import GIB
from megapromoe.preflight.verdict import FAIL, PASS, WARN, Cluster, Limits, Row, disagreements, usual
from megapromoe.versions import versions as package_versions

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
MAY_DIFFER = ("driver",)  # versions: NCCL gets along, but it is worth knowing

# What nvidia-smi is asked of each GPU, and the answers that are worth a line: verdict, meaning, remedy.
_RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset), or replace it"
GPU_FACTS = {
    "ecc.errors.uncorrected.volatile.total": (FAIL, "uncorrected memory errors", _RESET),
    "remapped_rows.failure": (FAIL, "memory rows that could not be remapped", "replace the GPU"),
    "remapped_rows.pending": (WARN, "memory rows to be remapped", _RESET),
    "retired_pages.pending": (WARN, "memory pages to be retired", _RESET),
    "clocks_throttle_reasons.hw_slowdown": (WARN, "slowed down by heat or power", "see to its cooling and power"),
}
_NOTHING = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]", "")
# Settings that are rarely meant in training, and what they do.
SLOW_SETTINGS = {
    "NCCL_P2P_DISABLE": "GPUs of a node no longer talk directly",
    "NCCL_SHM_DISABLE": "GPUs of a node no longer talk through shared memory",
    "NCCL_IB_DISABLE": "nodes no longer talk over InfiniBand",
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
}


@dataclass(frozen=True)
class Machine:
    """What a rank found. Bytes, except `teraflops` of the device and `wrong`, rows of its product that were not exact.

    `error` is why the device could not be tried. `gpus` is what nvidia-smi says, on the first rank of a node.
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


def examine(launch: runtime.Launch, leader: bool) -> Machine:
    """Looks at this rank's machine and tries its device; needs no other rank."""
    gpus = ask_gpus() if leader else []
    host = _memory_of_host()
    name, uuid, memory, free = platform.machine(), "", host["MemTotal"], host["MemAvailable"]
    wrong, teraflops, error, kind = 0, 0.0, "", "none"
    try:
        device = runtime.device_of(launch)
        kind = device.type
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(device)
            free, memory = torch.cuda.mem_get_info(device)
            name, uuid = properties.name, str(properties.uuid)
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
    )


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


# ---- rules


def _labelled(label: str, value: str) -> str:
    return f"{label} {value}"


def judge_versions(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every version is the same on all nodes, and on the ranks of one node."""
    found: dict[int, Machine] = cluster.found.get("machine", {})
    if not found:
        return
    rows: list[Row] = []
    names = list(dict.fromkeys(name for machine in found.values() for name in machine.versions))
    for name in names:
        values = {}
        for node in cluster.nodes:
            own = {found[r].versions[name] for r in cluster.ranks_on(node) if r in found and name in found[r].versions}
            if own:
                values[node] = " and ".join(sorted(own))
        remedy = f"make {name} the same everywhere: one environment on a shared path, or one image"
        rows += disagreements("versions", values, partial(_labelled, name), remedy, serious=name not in MAY_DIFFER)
    yield from rows
    if not rows:
        told = ", ".join(f"{name} {version}" for name, version in found[min(found)].versions.items())
        yield Row("versions", tuple(cluster.nodes), told, "equal", PASS)


def judge_devices(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Each rank has a device of its own, like all others, that multiplies rightly, fast enough, and is healthy."""
    found: dict[int, Machine] = cluster.found.get("machine", {})
    if not found:
        return
    rows = [*_devices_there(cluster, found), *_devices_right(cluster, found, limits), *_gpus_healthy(cluster, found)]
    yield from rows
    if not any(row.verdict == FAIL for row in rows):
        names = " and ".join(sorted({machine.name for machine in found.values()}))
        speeds = [machine.teraflops for machine in found.values()]
        cuda = any(machine.device == "cuda" for machine in found.values())
        of_what = "" if cuda else "no GPU: CPU run; "
        told = f"{of_what}{len(found)} x {names}, products exact, {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s"
        yield Row("devices", tuple(cluster.nodes), told, f"{limits.device_share:.0%} of the usual speed", PASS)


def _devices_there(cluster: Cluster, found: dict[int, Machine]) -> Iterator[Row]:
    kinds = {node: found[rank].device for node, rank in cluster.leaders().items() if rank in found}
    if len(set(kinds.values())) > 1:
        without = tuple(node for node, kind in kinds.items() if kind != "cuda")
        remedy = "is the driver loaded there (nvidia-smi), is torch a CUDA build, did the job ask for GPUs?"
        yield Row("devices", without, "no GPU visible", "GPUs, as on the others", FAIL, remedy, without)
        return
    for node, rank in cluster.leaders().items():
        if rank in found and found[rank].gpus and found[rank].device == "cpu":
            said = f"nvidia-smi lists {len(found[rank].gpus)} GPUs, torch sees none"
            remedy = "install a CUDA build of torch that the driver supports; see CUDA_VISIBLE_DEVICES"
            yield Row("devices", (node,), said, "the same", FAIL, remedy, (node,))
    for node in cluster.nodes:
        uuids = [found[rank].uuid for rank in cluster.ranks_on(node) if rank in found and found[rank].uuid]
        if len(set(uuids)) < len(uuids):
            said = f"{len(uuids)} ranks share {len(set(uuids))} visible GPUs"
            remedy = "start as many ranks as the node has GPUs; if it has more, some have dropped off the bus"
            yield Row("devices", (node,), said, "one GPU a rank", FAIL, remedy, (node,))
    for what, value in (("name", "{0.name}"), ("memory", "{0.memory}")):
        if "cuda" in kinds.values():
            values = {
                node: " and ".join(sorted({value.format(found[r]) for r in cluster.ranks_on(node) if r in found}))
                for node in cluster.nodes
            }
            remedy = "ask for one kind of GPU (a constraint or partition); an unlike one holds up all others"
            yield from disagreements("devices", values, partial(_labelled, what), remedy, serious=False)


def _devices_right(cluster: Cluster, found: dict[int, Machine], limits: Limits) -> Iterator[Row]:
    speeds = [machine.teraflops for machine in found.values() if not machine.error]
    for rank, machine in sorted(found.items()):
        node = (cluster.node_of[rank],)
        which = f"rank {rank} ({machine.uuid})" if machine.uuid else f"rank {rank}"
        if machine.error:
            remedy = "see nvidia-smi and the kernel's log (Xid) of that node; drain it"
            yield Row("devices", node, f"{which}: {machine.error}", "a product", FAIL, remedy, node)
            continue
        if machine.wrong:
            remedy = "the device computes wrongly: drain the node and replace it"
            yield Row("devices", node, f"{which}: {machine.wrong} rows wrong", "exact", FAIL, remedy, node)
        if machine.teraflops < limits.device_share * usual(speeds):
            gpu = machine.device == "cuda"
            said = f"{which}: {machine.teraflops:.3g} TFLOP/s"
            limit = f"{limits.device_share:.0%} of {usual(speeds):.3g}, the usual"
            remedy = "look for heat, a power cap, lowered clocks or another job on it"
            # A CPU shares its machine with others; nobody trains at scale on it.
            yield Row("devices", node, said, limit, FAIL if gpu else WARN, remedy, node if gpu else ())
        if machine.device == "cuda" and machine.free < 0.9 * machine.memory:
            said = f"{which}: {machine.free / GIB:.1f} of {machine.memory / GIB:.1f} GiB free"
            yield Row("devices", node, said, "90 % free", WARN, "end the process that holds the rest (nvidia-smi)")


def _gpus_healthy(cluster: Cluster, found: dict[int, Machine]) -> Iterator[Row]:
    for rank, machine in sorted(found.items()):
        node = (cluster.node_of[rank],)
        for gpu in machine.gpus:
            for name, (verdict, meaning, remedy) in GPU_FACTS.items():
                if (value := gpu.get(name, "")) not in _NOTHING:
                    said = f"GPU {gpu['index']} ({gpu['uuid']}): {meaning}: {value}"
                    yield Row("devices", node, said, "none", verdict, remedy, node if verdict == FAIL else ())


def judge_host(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Memory for what the ranks keep on the host, /dev/shm and open files for NCCL and the loader, sane settings."""
    found: dict[int, Machine] = cluster.found.get("machine", {})
    if not found:
        return
    rows: list[Row] = []
    files = max(1024, 8 * cluster.world)
    for node, rank in cluster.leaders().items():
        if (machine := found.get(rank)) is None:
            continue
        if machine.host_available < limits.host_bytes:
            said = f"{machine.host_available / GIB:.1f} GiB of host memory available"
            limit = f"{limits.host_bytes / GIB:.1f} GiB of states"
            remedy = "free memory, take fewer ranks a node, or offload less"
            rows.append(Row("host", (node,), said, limit, FAIL, remedy, (node,)))
        if machine.shared_memory < GIB:
            said = f"/dev/shm of {machine.shared_memory / GIB:.2f} GiB"
            rows.append(Row("host", (node,), said, "1 GiB", WARN, "give the container more (--shm-size, --ipc=host)"))
        if machine.open_files < files:
            said = f"{machine.open_files} open files allowed"
            rows.append(Row("host", (node,), said, f"{files}", WARN, f"ulimit -n {files}, in the launcher"))
        for name, effect in SLOW_SETTINGS.items():
            if machine.settings.get(name, "0") != "0":
                said = f"{name}={machine.settings[name]}"
                rows.append(Row("host", (node,), said, "unset", WARN, f"unset it unless it is meant: {effect}"))
        threads = machine.settings.get("OMP_NUM_THREADS", "")
        local = len(cluster.ranks_on(node))
        if threads.isdecimal() and int(threads) * local > max(machine.cpus, local):
            said = f"OMP_NUM_THREADS={threads} x {local} ranks on {machine.cpus} cores"
            rows.append(Row("host", (node,), said, "the cores", WARN, "lower OMP_NUM_THREADS"))
    own = {node: found[rank] for node, rank in cluster.leaders().items() if rank in found}
    sets = {node: _shared_settings(machine) for node, machine in own.items()}
    remedy = "export the same on every node; the environment comes from each node's shell start-up or module files"
    rows += disagreements("host", sets, _show_settings, remedy, serious=False)
    memory = usual(machine.host_memory for machine in own.values())
    for node, machine in own.items():
        if machine.host_memory < 0.8 * memory:
            said, limit = f"{machine.host_memory / GIB:.1f} GiB of memory", f"80 % of {memory / GIB:.1f} GiB, the usual"
            rows.append(Row("host", (node,), said, limit, WARN, "a memory module may have failed"))
    yield from rows
    if not any(row.verdict == FAIL for row in rows):
        least = min(own.values(), key=lambda machine: machine.host_available)
        told = f"at least {least.host_available / GIB:.1f} GiB available, {least.cpus} cores"
        yield Row("host", tuple(own), told, f"{limits.host_bytes / GIB:.1f} GiB of states", PASS)


def _shared_settings(machine: Machine) -> tuple[str, ...]:
    """Settings that have no reason to differ; which devices a rank sees is its own affair."""
    return tuple(f"{k}={v}" for k, v in machine.settings.items() if not k.startswith("CUDA_VISIBLE"))


def _show_settings(settings: tuple[str, ...]) -> str:
    return " ".join(settings) or "no settings of NCCL, CUDA or OpenMP"
