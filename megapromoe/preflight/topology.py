"""How a node is built, as its kernel describes it: NUMA nodes of cores and GPUs, adapters for RDMA."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")


def pci_address(properties: Any) -> str:
    """The PCI address of a GPU from torch's properties of it, as in "0000:1b:00.0"; "" if torch does not know it."""
    if not hasattr(properties, "pci_bus_id"):
        return ""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def numa_of_gpu(address: str, system: Path = SYSTEM) -> int:
    """The NUMA node that a PCI device is attached to; -1 if the kernel does not say."""
    try:
        return int((system / "bus" / "pci" / "devices" / address / "numa_node").read_text()) if address else -1
    except (OSError, ValueError):
        return -1


def numa_of_cores(cores: Collection[int], system: Path = SYSTEM) -> list[int]:
    """The NUMA nodes that some cores are of; empty if the kernel does not say."""
    nodes = []
    for folder in sorted((system / "devices" / "system" / "node").glob("node[0-9]*")):
        try:
            own = numbers((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if own & set(cores):
            nodes.append(int(folder.name.removeprefix("node")))
    return sorted(nodes)


def numbers(ranges: str) -> set[int]:
    """ "0-2,8" -> 0, 1, 2, 8."""
    found: set[int] = set()
    for part in ranges.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            found |= set(range(int(low), int(high or low) + 1))
    return found


def has_rdma(system: Path = SYSTEM) -> bool:
    """Whether the node has an adapter for InfiniBand or RoCE."""
    folder = system / "class" / "infiniband"
    return folder.is_dir() and any(folder.iterdir())
