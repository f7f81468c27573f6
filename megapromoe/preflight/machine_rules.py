"""The rules for what ranks found on their machines: versions, devices, host memory, limits and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from megapromoe.planning.machines import GIB
from megapromoe.preflight.machine import GPU_FACTS, SETUP_FAULTS, Machine
from megapromoe.preflight.verdict import (
    FAIL,
    PASS,
    WARN,
    Cluster,
    Limits,
    Row,
    disagreements,
    shared_by_all,
    usual,
)

MAY_DIFFER = ("driver",)  # versions: NCCL gets along, but it is worth knowing
# Settings that are rarely meant in training, and what they do.
SLOW_SETTINGS = {
    "NCCL_P2P_DISABLE": "GPUs of a node no longer talk directly",
    "NCCL_SHM_DISABLE": "GPUs of a node no longer talk through shared memory",
    "NCCL_IB_DISABLE": "nodes no longer talk over InfiniBand",
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
}

_NOTHING = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]", "")
LOCKED = GIB  # bytes of locked memory below which RDMA may fail


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
    rows = []
    for node, rank in cluster.leaders().items():
        if rank in found and found[rank].gpus and found[rank].device == "cpu":
            reason = found[rank].no_gpu
            said = f"nvidia-smi lists {len(found[rank].gpus)} GPUs, torch sees none{f': {reason}' if reason else ''}"
            remedy = "install a CUDA build of torch that the driver supports; see CUDA_VISIBLE_DEVICES"
            rows.append(_setup_or_node(Row("devices", (node,), said, "the same", FAIL, remedy, (node,)), reason))
    yield from shared_by_all(cluster, rows)
    rows = []
    for node in cluster.nodes:
        uuids = [found[rank].uuid for rank in cluster.ranks_on(node) if rank in found and found[rank].uuid]
        if len(set(uuids)) < len(uuids):
            said = f"{len(uuids)} ranks share {len(set(uuids))} visible GPUs"
            remedy = "start as many ranks as the node has GPUs; if it has more, some have dropped off the bus"
            rows.append(Row("devices", (node,), said, "one GPU a rank", FAIL, remedy, (node,)))
    yield from shared_by_all(cluster, rows)
    for what, value in (("name", "{0.name}"), ("memory", "{0.memory}")):
        if "cuda" in kinds.values():
            values = {
                node: " and ".join(sorted({value.format(found[r]) for r in cluster.ranks_on(node) if r in found}))
                for node in cluster.nodes
            }
            remedy = "ask for one kind of GPU (a constraint or partition); an unlike one holds up all others"
            yield from disagreements("devices", values, partial(_labelled, what), remedy, serious=False)


def _setup_or_node(row: Row, reason: str) -> Row:
    """The row, blaming the setup in place of the node if the reason is one that any node would have."""
    if any(fault in reason for fault in SETUP_FAULTS):
        return replace(row, blame=(), setup=True)
    return row


def _devices_right(cluster: Cluster, found: dict[int, Machine], limits: Limits) -> Iterator[Row]:
    speeds = [machine.teraflops for machine in found.values() if not machine.error]
    failing: dict[str, list[Row]] = {}  # by error: an error of all nodes is not theirs
    for rank, machine in sorted(found.items()):
        node = (cluster.node_of[rank],)
        which = f"rank {rank} ({machine.uuid})" if machine.uuid else f"rank {rank}"
        if machine.error:
            remedy = "see nvidia-smi and the kernel's log (Xid) of that node; drain it"
            row = Row("devices", node, f"{which}: {machine.error}", "a product", FAIL, remedy, node)
            failing.setdefault(machine.error, []).append(_setup_or_node(row, machine.error))
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
        if machine.gpu_numa >= 0 and machine.core_numa and machine.gpu_numa not in machine.core_numa:
            cores = ", ".join(map(str, machine.core_numa))
            said = f"{which}: its cores are of NUMA node {cores}, its GPU is at {machine.gpu_numa}"
            remedy = "bind neighbouring ranks to one socket: srun --distribution=block:block --cpu-bind=cores"
            yield Row("devices", node, said, "the same NUMA node", WARN, remedy)
    for rows in failing.values():
        yield from shared_by_all(cluster, rows)


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
    rows: list[Row] = [*_memory_for_states(cluster, found, limits)]
    files = max(1024, 8 * cluster.world)
    for node, rank in cluster.leaders().items():
        if (machine := found.get(rank)) is None:
            continue
        if machine.shared_memory < GIB:
            said = f"/dev/shm of {machine.shared_memory / GIB:.2f} GiB"
            rows.append(Row("host", (node,), said, "1 GiB", WARN, "give the container more (--shm-size, --ipc=host)"))
        if machine.open_files < files:
            said = f"{machine.open_files} open files allowed"
            rows.append(Row("host", (node,), said, f"{files}", WARN, f"ulimit -n {files}, in the launcher"))
        if machine.rdma and 0 <= machine.locked_memory < LOCKED:
            said = f"ulimit -l: {machine.locked_memory // 1024:,} KiB of locked memory"
            remedy = (
                "RDMA locks its buffers: ulimit -l unlimited in the launcher; if that is refused, LimitMEMLOCK=infinity"
                " for slurmd and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
            )
            rows.append(Row("host", (node,), said, "unlimited", WARN, remedy))
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
        locked = "unlimited" if least.locked_memory < 0 else f"{least.locked_memory // 1024:,} KiB"
        told = f"at least {least.host_available / GIB:.1f} GiB available, {least.cpus} cores, ulimit -l {locked}"
        yield Row("host", tuple(own), told, f"{limits.host_bytes / GIB:.1f} GiB of states", PASS)


def _memory_for_states(cluster: Cluster, found: dict[int, Machine], limits: Limits) -> Iterator[Row]:
    """Nodes whose host memory does not hold the states of their ranks."""
    limit = f"{limits.host_bytes / GIB:.1f} GiB of states"
    own = {node: found[rank] for node, rank in cluster.leaders().items() if rank in found}
    too_small = all(machine.host_memory < limits.host_bytes for machine in own.values())
    rows = []
    for node, machine in own.items():
        if machine.host_available < limits.host_bytes:
            said = f"{machine.host_available / GIB:.1f} GiB of host memory available"
            remedy = "free memory, take fewer ranks a node, or offload less"
            blame = () if too_small else (node,)
            rows.append(Row("host", (node,), said, limit, FAIL, remedy, blame, setup=too_small))
    yield from shared_by_all(cluster, rows)


def _shared_settings(machine: Machine) -> tuple[str, ...]:
    """Settings that have no reason to differ; which devices a rank sees is its own affair."""
    return tuple(f"{k}={v}" for k, v in machine.settings.items() if not k.startswith("CUDA_VISIBLE"))


def _show_settings(settings: tuple[str, ...]) -> str:
    return " ".join(settings) or "no settings of NCCL, CUDA or OpenMP"
