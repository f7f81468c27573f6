"""Runs measurements on a GPU that is available for a short time: stages one after the other, each with a time limit.

The folder --out gets machine.json, report.md with the results, and a folder for each stage with its logs. If the
command is repeated, finished stages are skipped, and stages that failed or reached their limit are continued.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megapromoe.benchmark.gpu_machine import GpuRunError, check_machine
from megapromoe.benchmark.gpu_runner import GpuRun
from megapromoe.benchmark.gpu_stages import STAGES, TESTS, stage_commands, stage_figures
from megapromoe.benchmark.gpu_wheels import LACKING, collect, install_command, wheel_commands
from megapromoe.distributed import runtime
from megapromoe.errors import UserError
from megapromoe.io import write_text

_EPILOG = """\
examples:
  gpu_run.py all --minutes 5 --out runs/gpu                   all stages, the most important first
  gpu_run.py step --out runs/gpu --again                      again, after a change
  gpu_run.py all --device cpu --quick --out runs/gpu-quick    test without a GPU
  gpu_run.py wheels --into .whl --python 3.12                 on a machine with internet access
  gpu_run.py tests --wheels .whl --out runs/gpu               on one without

exit codes: 0 finished, or stopped by the time limit, 1 a stage failed, 2 the command line is invalid,
130 interrupted"""


def main(argv: Sequence[str], root: Path) -> int:
    """Runs a command line in the checkout `root`; returns the exit code."""
    options = _parser().parse_args(argv)
    # Background jobs of a shell ignore SIGINT, and their child processes too; but stages are ended with SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if options.action == "wheels":
            constraints = root / "constraints.txt"
            commands = wheel_commands(options.into, options.python, options.torch, options.packages, constraints)
            collect(options.into, commands, options.dry_run)
            return 0
        return _run(options, root)
    except UserError as error:
        print(f"gpu_run: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"gpu_run: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gpu_run: interrupted; repeat the command to continue", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="gpu_run.py", description=__doc__, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", metavar="STAGE", required=True)
    for stage in (*STAGES, "all"):
        summary = "all stages, one after the other" if stage == "all" else f"the stage `{stage}`"
        stage_parser = actions.add_parser(stage, help=summary, description=summary, allow_abbrev=False)
        add = stage_parser.add_argument
        add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: runs/gpu")
        add("--minutes", type=float, default=9.0, metavar="M", help="time limit of each stage in minutes; default: 9")
        add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
        add("--quick", action="store_true", help="the smallest model and few steps, to test that everything runs")
        add("--again", action="store_true", help="remove the results of the stage and start again")
        add("--wheels", type=Path, metavar="DIR", help="first install the wheels of this folder into --out/site")
        add("--dry-run", action="store_true", help="only print the command lines")
    wheels = actions.add_parser(
        "wheels", help="collect wheels for a machine without internet access", allow_abbrev=False
    )
    add = wheels.add_argument
    add("--into", type=Path, default=Path(".whl"), metavar="DIR", help="the folder for the wheels; default: .whl")
    add("--python", default="3.12", metavar="VERSION", help="Python of the other machine; default: 3.12")
    add("--torch", metavar="VERSION+TAG", help="also collect torch, such as 2.13.0+cu130; default: do not")
    add("--packages", nargs="*", default=list(LACKING), metavar="NAME", help=f"default: {' '.join(LACKING)}")
    add("--dry-run", action="store_true", help="only print the command lines")
    return parser


def _run(options: argparse.Namespace, root: Path) -> int:
    if not 0 < options.minutes < math.inf:
        raise GpuRunError(f"--minutes {options.minutes}: must be a number above 0")
    if missing := [name for name in TESTS if not (root / name).is_file()]:
        raise GpuRunError(f"{root}: has no {', '.join(missing)}; run this from a complete checkout")
    out = options.out.resolve()
    stages = STAGES if options.action == "all" else (options.action,)
    seconds = 60 * options.minutes
    planned = {stage: stage_commands(stage, out, options.device, options.quick, seconds) for stage in stages}
    site = out / "site" if options.wheels is not None else None
    install = install_command(options.wheels, out / "site") if options.wheels is not None else None
    if options.dry_run:
        if install is not None:
            print(shlex.join([sys.executable, *install]))
        for command in (command for commands in planned.values() for command in commands):
            settings = [f"{name}={value}" for name, value in command.settings]
            print(shlex.join([*settings, sys.executable, *command.words]))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(root, site, options.device)
    if install is not None and subprocess.run([sys.executable, *install]).returncode:
        raise GpuRunError(f"--wheels {options.wheels}: pip could not install them; see its message above")
    machine = check_machine(out, options.device, environment)
    gpu_run = GpuRun(out, root, seconds, environment, machine)
    for stage, commands in planned.items():  # check all stages before anything is run or removed
        if not options.again:
            gpu_run.commands_done(stage, commands)
    failed = []
    for stage, commands in planned.items():
        if options.again:
            gpu_run.discard(stage)
        if gpu_run.run_stage(stage, commands) == "failed":
            failed.append(stage)
        write_text(out / "report.md", gpu_run.report())
        for line in stage_figures(stage, out / stage):
            print(f"  {line}", flush=True)
    print(f"results: {out / 'report.md'}")
    if failed:
        print(f"gpu_run: failed: {', '.join(failed)}; see the logs in {out}", file=sys.stderr)
    return 1 if failed else 0


def _environment(root: Path, site: Path | None, device: str) -> dict[str, str]:
    """The environment of the stages' processes, which selects this checkout, the wheels, and the device."""
    environment = {**runtime.job_environment(), "DS_ACCELERATOR": device, "PYTHONUNBUFFERED": "1"}
    paths = [str(root), *([str(site)] if site else []), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
