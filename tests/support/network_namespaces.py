"""Two nodes on this machine: network namespaces with a link between them, which can be taken down and up again."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.213.7.1", "10.213.7.2")
INTERFACE = "node"
_NUMBERS = itertools.count()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


def set_link(node: str, state: str) -> None:
    """Takes the link of a node "down" or "up"."""
    ip("-n", node, "link", "set", INTERFACE, state)


def why_not() -> str:
    """Why no namespaces can be made here, or ""."""
    if not shutil.which("ip"):
        return "there is no `ip`"
    name = f"megapromoe-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespace can be made: {getattr(error, 'stderr', None) or error}".strip()
    return ""


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Names of two namespaces with an interface `INTERFACE` and one of `ADDRESSES` each."""
    number = next(_NUMBERS)
    names = [f"megapromoe-{os.getpid()}-{number}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for address, name in zip(ADDRESSES, names, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            set_link(name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
