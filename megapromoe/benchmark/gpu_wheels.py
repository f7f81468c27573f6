"""Wheels for a machine without internet access: the packages that a common GPU image with torch lacks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megapromoe.distributed import runtime
from megapromoe.errors import UserError

# Packages that images with torch, numpy and the common scientific packages lack. DeepSpeed is built from source.
LACKING = ("pydantic", "pydantic_core", "typing-inspection", "annotated-types", "hjson", "py-cpuinfo")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


class WheelsError(UserError):
    """Wheels cannot be collected or installed."""


def wheel_commands(
    into: Path, python: str, torch: str | None, packages: Sequence[str], constraints: Path
) -> list[tuple[str, ...]]:
    """The command lines of pip, without the Python interpreter, that collect wheels in the folder `into`.

    Args:
        python: version of the other machine, such as "3.12".
        torch: "VERSION+TAG" such as "2.13.0+cu130" to collect torch with its dependencies; None: without torch.
        packages: names of packages, collected in the versions of `constraints` without their dependencies.
        constraints: constraints.txt of the checkout.

    Raises WheelsError for an invalid version, or a package that `constraints` does not pin.
    """
    if not re.fullmatch(r"3\.\d+", python):
        raise WheelsError(f"--python {python}: must be a version such as 3.12")
    download: tuple[str, ...] = (
        "-m",
        "pip",
        "download",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
    )
    download += tuple(word for platform in PLATFORMS for word in ("--platform", platform))
    # PyPI has no wheel of DeepSpeed. Without its compiled operators it is pure Python, so this wheel runs anywhere.
    built = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(into), pinned("deepspeed", constraints))
    commands: list[tuple[str, ...]] = [("-m", "pip", "wheel", *built)]
    if packages:
        # One call, so that pip detects conflicts between packages.
        names = (pinned(name, constraints) for name in packages)
        commands.append((*download, "--no-deps", "--dest", str(into), *names))
    if torch is not None:
        version, _, tag = torch.partition("+")
        if not version or not tag:
            raise WheelsError(f"--torch {torch}: must be VERSION+TAG, such as 2.13.0+cu130")
        index = f"https://download.pytorch.org/whl/{tag}"
        commands.append((*download, "--dest", str(into), "--index-url", index, f"torch=={version}"))
    return commands


def pinned(name: str, constraints: Path) -> str:
    """The requirement "name==version" of a constraints file. Raises WheelsError if it has none."""
    try:
        lines = constraints.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise WheelsError(f"{constraints}: {error.strerror}; run this from a checkout") from error
    matches = [line for line in lines if line.lower().startswith(f"{name.lower()}==")]
    if not matches:
        raise WheelsError(f"{name}: {constraints} pins no version of it; add a line {name}==VERSION")
    return matches[0]


def collect(into: Path, commands: Sequence[tuple[str, ...]], dry_run: bool) -> None:
    """Prints and runs the command lines, then lists the wheels; with `dry_run` only prints.

    Raises WheelsError if pip fails.
    """
    environment = {**runtime.job_environment(), "DS_BUILD_OPS": "0"}
    for words in commands:
        print(f"DS_BUILD_OPS=0 {shlex.join([sys.executable, *words])}", flush=True)
        if not dry_run:
            into.mkdir(parents=True, exist_ok=True)
            code = subprocess.run([sys.executable, *words], env=environment).returncode
            if code:
                raise WheelsError(f"pip failed with exit code {code}; see its message above")
    if not dry_run:
        for wheel in sorted(into.glob("*.whl")):
            print(f"{wheel.stat().st_size / 2**20:8.1f} MiB  {wheel.name}")


def install_command(wheels: Path, site: Path) -> tuple[str, ...]:
    """The command line of pip, without the Python interpreter, that installs wheels into the folder `site`, offline."""
    files = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not files:
        raise WheelsError(
            f"--wheels {wheels}: has no wheels; run `gpu_run.py wheels` on a machine with internet access"
        )
    options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site))
    return ("-m", "pip", "install", "--quiet", *options, *files)
