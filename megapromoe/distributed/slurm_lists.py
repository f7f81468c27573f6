"""Parses SLURM's compressed lists of nodes and of tasks per node, as in its environment variables."""

from __future__ import annotations

import re


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: "gpu[03-05,9],x" -> "gpu03"."""
    return all_hosts(nodelist)[0]


def all_hosts(nodelist: str) -> list[str]:
    """All hosts of SLURM's compressed list, in its order: "gpu[03-05,9],x" -> gpu03, gpu04, gpu05, gpu9, x."""
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        prefix, *rest = re.split(r"\[([^\]]*)\]", item)
        names = [prefix]
        for ranges, text in zip(rest[::2], rest[1::2], strict=True):
            names = [f"{name}{number}{text}" for name in names for number in _numbers(ranges)]
        hosts += names
    return hosts


def _numbers(ranges: str) -> list[str]:
    """Expands a list of ranges and keeps leading zeros: "03-05,9" -> 03, 04, 05, 9."""
    numbers = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        numbers += [f"{n:0{len(low)}}" for n in range(int(low), int(high or low) + 1)]
    return numbers


def tasks_of_nodes(tasks: str) -> list[int]:
    """Tasks of each node: "2(x3),1" -> 2, 2, 2, 1. Empty if the text is not such a list."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", tasks):
        return []
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts
