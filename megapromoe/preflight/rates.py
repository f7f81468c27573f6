"""Rates of a device and of the collectives, for `megapromoe plan --measured`. No rule evaluates them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.preflight.groups import OPERATIONS, all_gather, reduce_scatter
from megapromoe.preflight.machine import synchronize

SMALL = 4096  # bytes of a message whose time is that of its latency


def measure_device(device: torch.device) -> tuple[float, float]:
    """Measures the memory bandwidth of an elementwise kernel, and the time in which the host launches a small one.

    Returns:
        Bytes per second, read and written; seconds of a launch, on a CPU with the time of the operator.
    """
    large, repeats, launches = (2**28, 20, 500) if device.type == "cuda" else (2**23, 3, 500)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all ranks of a node measure at the same time
    try:
        x = torch.ones(large, device=device)
        y = torch.empty_like(x)
        seconds = _seconds(lambda: torch.add(x, 1.0, out=y), repeats, device)
        rate = repeats * 2 * x.numel() * x.element_size() / seconds
        small = torch.ones(64, device=device)
        torch.add(small, 1.0, out=small)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(launches):
            torch.add(small, 1.0, out=small)
        launch = (time.perf_counter() - start) / launches  # without waiting for a GPU
        synchronize(device)
    finally:
        torch.set_num_threads(threads)
    return rate, launch


def measure_collectives(
    mesh: Mesh, device: torch.device, at: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Times a small and a large message of each collective in each group of the layout. Collective.

    A group with the ranks of an earlier one is left out, and one of a single rank.

    Args:
        at: called with the name of each step.

    Yields:
        The name of the group; operation -> [bytes of the small message, its seconds, bytes of the large one, its
        seconds]. Bytes are those of a rank's input, of an all-gather those of its output, as in `planning.traffic`.
    """
    large = (64 if device.type == "cuda" else 4) * 2**20
    measured: list[tuple[int, ...]] = []
    for direction, group in mesh.directions.items():
        if group.size == 1 or tuple(group.ranks) in measured:
            continue
        measured.append(tuple(group.ranks))
        times: dict[str, list[float]] = {}
        for operation in OPERATIONS:
            at(f"speed of {operation} in {direction}")
            times[operation] = []
            for size, repeats in ((SMALL, 20), (large, 5)):
                call, sent = _collective(operation, group, size, device)
                times[operation] += [float(sent), _seconds(call, repeats, device) / repeats]
        yield direction, times


def _collective(operation: str, group: Group, size: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A call of a collective with about `size` bytes, and its bytes."""
    part = max(1, size // 4 // group.size)
    x = torch.ones(part * group.size, device=device)
    handle = group.process_group
    if operation == "all_reduce":
        x.zero_()  # sums of ones would grow
        return lambda: dist.all_reduce(x, group=handle), x.nbytes
    if operation == "all_to_all":
        y = torch.empty_like(x)
        return lambda: dist.all_to_all_single(y, x, group=handle), x.nbytes
    own_part = torch.ones(part, device=device)
    if operation == "all_gather":
        return lambda: all_gather(x, own_part, group=handle), x.nbytes
    return lambda: reduce_scatter(own_part, x, group=handle), x.nbytes


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The time of `repeats` calls, after one that is not timed."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return time.perf_counter() - start
