"""The rules for the ranks' machines: versions, devices, host memory, limits and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from megapromoe.planning.machines import GIB
from megapromoe.preflight.machine import GPU_HEALTH_FIELDS, SETUP_FAULTS, Machine
from megapromoe.preflight.verdict import (
    FAIL,
    PASS,
    WARN,
    Cluster,
    Limits,
    Row,
    blame_setup_if_on_all_nodes,
    rows_of_differences,
    upper_median,
)

MAY_DIFFER = ("driver",)  # versions whose difference is only a warning: NCCL works with several drivers
# Settings that are rarely intended in training, and their effect.
SLOW_SETTINGS = {
    "NCCL_P2P_DISABLE": "GPUs of a node do not communicate directly",
    "NCCL_SHM_DISABLE": "GPUs of a node do not communicate through shared memory",
    "NCCL_IB_DISABLE": "nodes do not communicate over InfiniBand",
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
}

_NO_FAULT = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]", "")  # values of nvidia-smi without a fault
LOCKED = GIB  # bytes of locked memory below which RDMA may fail


def _labelled(label: str, value: str) -> str:
    return f"{label} {value}"


def evaluate_versions(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every version must be the same on all nodes, and on all ranks of a node."""
    machines: dict[int, Machine] = cluster.findings.get("machine", {})
    if not machines:
        return
    rows: list[Row] = []
    names = list(dict.fromkeys(name for machine in machines.values() for name in machine.versions))
    for name in names:
        values = {}
        for node in cluster.nodes:
            versions_of_ranks = [machines[rank].versions for rank in cluster.ranks_on(node) if rank in machines]
            if installed := {versions[name] for versions in versions_of_ranks if name in versions}:
                values[node] = " and ".join(sorted(installed))
        remedy = f"install the same {name} on all nodes: one environment on a shared path, or one image"
        rows += rows_of_differences(
            "versions", values, partial(_labelled, name), remedy, serious=name not in MAY_DIFFER
        )
    yield from rows
    if not rows:
        result = ", ".join(f"{name} {version}" for name, version in machines[min(machines)].versions.items())
        yield Row("versions", tuple(cluster.nodes), result, "equal", PASS)


def evaluate_devices(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Each rank must have its own device of the same kind; it must compute correctly, at the usual speed."""
    machines: dict[int, Machine] = cluster.findings.get("machine", {})
    if not machines:
        return
    rows = [
        *_devices_present(cluster, machines),
        *_devices_correct(cluster, machines, limits),
        *_gpus_healthy(cluster, machines),
    ]
    yield from rows
    if not any(row.verdict == FAIL for row in rows):
        names = " and ".join(sorted({machine.name for machine in machines.values()}))
        speeds = [machine.teraflops for machine in machines.values()]
        cuda = any(machine.device == "cuda" for machine in machines.values())
        note = "" if cuda else "no GPU: CPU run; "
        result = f"{note}{len(machines)} x {names}, products exact, {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s"
        yield Row("devices", tuple(cluster.nodes), result, f"{limits.device_share:.0%} of the usual speed", PASS)


def _devices_present(cluster: Cluster, machines: dict[int, Machine]) -> Iterator[Row]:
    """Every node has GPUs if any has; torch uses them, one for each rank, and they are of one kind."""
    kinds = {node: machines[rank].device for node, rank in cluster.leaders().items() if rank in machines}
    if len(set(kinds.values())) > 1:
        without = tuple(node for node, kind in kinds.items() if kind != "cuda")
        remedy = "check that the driver is loaded (nvidia-smi), torch is a CUDA build, and the job requests GPUs"
        yield Row("devices", without, "no GPU visible", "GPUs, as on the others", FAIL, remedy, without)
        return
    rows = []
    for node, rank in cluster.leaders().items():
        if rank in machines and machines[rank].gpus and machines[rank].device == "cpu":
            reason = machines[rank].no_gpu
            result = (
                f"nvidia-smi lists {len(machines[rank].gpus)} GPUs, torch finds none{f': {reason}' if reason else ''}"
            )
            remedy = "install a CUDA build of torch that the driver supports; check CUDA_VISIBLE_DEVICES"
            rows.append(_setup_or_node(Row("devices", (node,), result, "the same", FAIL, remedy, (node,)), reason))
    yield from blame_setup_if_on_all_nodes(cluster, rows)
    rows = []
    for node in cluster.nodes:
        uuids = [machines[rank].uuid for rank in cluster.ranks_on(node) if rank in machines and machines[rank].uuid]
        if len(set(uuids)) < len(uuids):
            result = f"{len(uuids)} ranks share {len(set(uuids))} visible GPUs"
            remedy = "start as many ranks as the node has GPUs; if it has enough, some are not visible to the driver"
            rows.append(Row("devices", (node,), result, "one GPU per rank", FAIL, remedy, (node,)))
    yield from blame_setup_if_on_all_nodes(cluster, rows)
    for what, value in (("name", "{0.name}"), ("memory", "{0.memory}")):
        if "cuda" in kinds.values():
            values = {
                node: " and ".join(sorted({value.format(machines[r]) for r in cluster.ranks_on(node) if r in machines}))
                for node in cluster.nodes
            }
            remedy = "request one kind of GPU (a constraint or partition): all ranks wait for the slowest"
            yield from rows_of_differences("devices", values, partial(_labelled, what), remedy, serious=False)


def _setup_or_node(row: Row, reason: str) -> Row:
    """The row, changed to blame the setup if `reason` is a fault of the installation and not of the node."""
    if any(fault in reason for fault in SETUP_FAULTS):
        return replace(row, blame=(), setup=True)
    return row


def _devices_correct(cluster: Cluster, machines: dict[int, Machine], limits: Limits) -> Iterator[Row]:
    """Every device computes correctly, at the usual speed, is free, and is close to the cores of its rank."""
    speeds = [machine.teraflops for machine in machines.values() if not machine.error]
    failing: dict[str, list[Row]] = {}  # by error message: an error on all nodes is no fault of the nodes
    for rank, machine in sorted(machines.items()):
        node = (cluster.node_of[rank],)
        which = f"rank {rank} ({machine.uuid})" if machine.uuid else f"rank {rank}"
        if machine.error:
            remedy = "drain the node; check nvidia-smi and the Xid errors in its kernel log"
            row = Row("devices", node, f"{which}: {machine.error}", "a product", FAIL, remedy, node)
            failing.setdefault(machine.error, []).append(_setup_or_node(row, machine.error))
            continue
        if machine.wrong:
            remedy = "the device computes wrongly: drain the node and replace it"
            yield Row("devices", node, f"{which}: {machine.wrong} rows wrong", "exact", FAIL, remedy, node)
        if machine.teraflops < limits.device_share * upper_median(speeds):
            gpu = machine.device == "cuda"
            result = f"{which}: {machine.teraflops:.3g} TFLOP/s"
            limit = f"{limits.device_share:.0%} of {upper_median(speeds):.3g}, the usual"
            remedy = "check for heat, a power cap, lowered clocks or another job on the device"
            # Only a warning for a CPU, which other programs of the machine use too.
            yield Row("devices", node, result, limit, FAIL if gpu else WARN, remedy, node if gpu else ())
        if machine.device == "cuda" and machine.free < 0.9 * machine.memory:
            result = f"{which}: {machine.free / GIB:.1f} of {machine.memory / GIB:.1f} GiB free"
            yield Row("devices", node, result, "90 % free", WARN, "end the process that uses the rest (nvidia-smi)")
        if machine.gpu_numa >= 0 and machine.core_numa and machine.gpu_numa not in machine.core_numa:
            cores = ", ".join(map(str, machine.core_numa))
            result = f"{which}: its cores are on NUMA node {cores}, its GPU on {machine.gpu_numa}"
            remedy = "bind neighbouring ranks to one socket: srun --distribution=block:block --cpu-bind=cores"
            yield Row("devices", node, result, "the same NUMA node", WARN, remedy)
    for rows in failing.values():
        yield from blame_setup_if_on_all_nodes(cluster, rows)


def _gpus_healthy(cluster: Cluster, machines: dict[int, Machine]) -> Iterator[Row]:
    """nvidia-smi reports no fault of any GPU of a node, used or not."""
    for rank, machine in sorted(machines.items()):
        node = (cluster.node_of[rank],)
        for gpu in machine.gpus:
            for name, (verdict, meaning, remedy) in GPU_HEALTH_FIELDS.items():
                if (value := gpu.get(name, "")) not in _NO_FAULT:
                    result = f"GPU {gpu['index']} ({gpu['uuid']}): {meaning}: {value}"
                    yield Row("devices", node, result, "none", verdict, remedy, node if verdict == FAIL else ())


def evaluate_host(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Host memory, /dev/shm, and limits on open files and locked memory must suffice; no setting may slow training."""
    machines: dict[int, Machine] = cluster.findings.get("machine", {})
    if not machines:
        return
    rows: list[Row] = [*_memory_for_states(cluster, machines, limits)]
    files = max(1024, 8 * cluster.world)
    for node, rank in cluster.leaders().items():
        if (machine := machines.get(rank)) is None:
            continue
        if machine.shared_memory < GIB:
            result = f"/dev/shm of {machine.shared_memory / GIB:.2f} GiB"
            rows.append(Row("host", (node,), result, "1 GiB", WARN, "give the container more (--shm-size, --ipc=host)"))
        if machine.open_files < files:
            result = f"{machine.open_files} open files allowed"
            rows.append(Row("host", (node,), result, f"{files}", WARN, f"run ulimit -n {files} in the job script"))
        if machine.rdma and 0 <= machine.locked_memory < LOCKED:
            result = f"ulimit -l: {machine.locked_memory // 1024:,} KiB of locked memory"
            remedy = (
                "RDMA locks its buffers: run ulimit -l unlimited in the job script; if that is not permitted, set"
                " LimitMEMLOCK=infinity for slurmd and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
            )
            rows.append(Row("host", (node,), result, "unlimited", WARN, remedy))
        for name, effect in SLOW_SETTINGS.items():
            if machine.settings.get(name, "0") != "0":
                result = f"{name}={machine.settings[name]}"
                rows.append(Row("host", (node,), result, "unset", WARN, f"unset it unless it is intended: {effect}"))
        threads = machine.settings.get("OMP_NUM_THREADS", "")
        local = len(cluster.ranks_on(node))
        if threads.isdecimal() and int(threads) * local > max(machine.cpus, local):
            result = f"OMP_NUM_THREADS={threads} x {local} ranks on {machine.cpus} cores"
            rows.append(Row("host", (node,), result, "the cores", WARN, "lower OMP_NUM_THREADS"))
    machine_of = {node: machines[rank] for node, rank in cluster.leaders().items() if rank in machines}
    settings = {node: _common_settings(machine) for node, machine in machine_of.items()}
    remedy = "export the same settings on every node; check each node's shell start-up and module files"
    rows += rows_of_differences("host", settings, _show_settings, remedy, serious=False)
    memory = upper_median(machine.host_memory for machine in machine_of.values())
    for node, machine in machine_of.items():
        if machine.host_memory < 0.8 * memory:
            result = f"{machine.host_memory / GIB:.1f} GiB of memory"
            limit = f"80 % of {memory / GIB:.1f} GiB, the usual"
            rows.append(Row("host", (node,), result, limit, WARN, "check its memory modules: one may have failed"))
    yield from rows
    if not any(row.verdict == FAIL for row in rows):
        least = min(machine_of.values(), key=lambda machine: machine.host_available)
        locked = "unlimited" if least.locked_memory < 0 else f"{least.locked_memory // 1024:,} KiB"
        result = f"at least {least.host_available / GIB:.1f} GiB available, {least.cpus} cores, ulimit -l {locked}"
        yield Row("host", tuple(machine_of), result, f"{limits.host_bytes / GIB:.1f} GiB of states", PASS)


def _memory_for_states(cluster: Cluster, machines: dict[int, Machine], limits: Limits) -> Iterator[Row]:
    """The host memory of each node holds the offloaded states of its ranks."""
    limit = f"{limits.host_bytes / GIB:.1f} GiB of states"
    machine_of = {node: machines[rank] for node, rank in cluster.leaders().items() if rank in machines}
    too_small = all(machine.host_memory < limits.host_bytes for machine in machine_of.values())
    rows = []
    for node, machine in machine_of.items():
        if machine.host_available < limits.host_bytes:
            result = f"{machine.host_available / GIB:.1f} GiB of host memory available"
            remedy = "free memory, use fewer ranks per node, or offload less"
            blame = () if too_small else (node,)
            rows.append(Row("host", (node,), result, limit, FAIL, remedy, blame, setup=too_small))
    yield from blame_setup_if_on_all_nodes(cluster, rows)


def _common_settings(machine: Machine) -> tuple[str, ...]:
    """The settings that should be the same on all nodes: all except the devices visible to a rank."""
    return tuple(f"{k}={v}" for k, v in machine.settings.items() if not k.startswith("CUDA_VISIBLE"))


def _show_settings(settings: tuple[str, ...]) -> str:
    return " ".join(settings) or "no settings of NCCL, CUDA or OpenMP"
