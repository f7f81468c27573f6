"""The entry of environment.json for each start of a run."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.versions import versions


def describe_start(
    config: Config,
    world: int,
    launcher: str,
    changed: dict[str, list[Any]],
    data: str | None,
    latents: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of environment.json for this start: command, host, launcher, layout, versions and git commit.

    Args:
        world: ranks of the job.
        launcher: name of the launcher, such as "torchrun".
        changed: settings that differ from the previous start, dotted name -> [stored, new].
        data: identity of the data set; None if it has none.
        latents: autoencoder, scale and shift of latents, with which generated ones are decoded; None for other data.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launcher": launcher,
        "layout": asdict(config.layout(world)),
        "versions": {"python": platform.python_version(), **versions(("megapromoe", "torch", "deepspeed", "numpy"))},
        "git": git_state(Path(__file__).resolve()),
        "changed": changed,
        "data": data,
        **({"latents": latents} if latents else {}),
    }


def git_state(file: Path) -> dict[str, Any] | None:
    """The commit of the git repository that tracks `file`, and whether tracked files were changed; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # fails for a package installed inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
