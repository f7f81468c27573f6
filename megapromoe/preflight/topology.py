"""Hardware topology of a node, read from the kernel's /sys: NUMA nodes of cores and GPUs, RDMA adapters."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")


def pci_address(properties: Any) -> str:
    """The PCI address of a GPU, as "0000:1b:00.0", from torch's device properties; "" if they do not hold it."""
    if not hasattr(properties, "pci_bus_id"):
        return ""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def numa_of_gpu(address: str, system: Path = SYSTEM) -> int:
    """The NUMA node that a PCI device is attached to; -1 if unknown."""
    try:
        return int((system / "bus" / "pci" / "devices" / address / "numa_node").read_text()) if address else -1
    except (OSError, ValueError):
        return -1


def numa_of_cores(cores: Collection[int], system: Path = SYSTEM) -> list[int]:
    """The NUMA nodes to which the cores belong; empty if unknown."""
    nodes = []
    for folder in sorted((system / "devices" / "system" / "node").glob("node[0-9]*")):
        try:
            cores_of_node = numbers((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cores_of_node & set(cores):
            nodes.append(int(folder.name.removeprefix("node")))
    return sorted(nodes)


def numbers(ranges: str) -> set[int]:
    """Expands a list of ranges: "0-2,8" -> 0, 1, 2, 8. Raises ValueError for other text."""
    result: set[int] = set()
    for part in ranges.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            result |= set(range(int(low), int(high or low) + 1))
    return result


def has_rdma(system: Path = SYSTEM) -> bool:
    """Whether the node has an InfiniBand or RoCE adapter."""
    folder = system / "class" / "infiniband"
    return folder.is_dir() and any(folder.iterdir())
