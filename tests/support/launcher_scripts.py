"""Runs launchers with the Python of the tests and without this environment's variables of clusters."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
DATA = "data.source=synthetic"  # presets of large models train on nothing that was not chosen
OURS = ("PRESET", "GPU", "RUN_DIR", "PREFLIGHT", "RETRIES", "MEGAPROMOE", "CONTAINER", "SRUN", "MASTER", "NODE_CACHE")
THEIRS = ("SLURM", "SBATCH", "OMPI", "PMI", "NPROC", "HOSTFILE", "MPI_ARGS", "NCCL", "OMP_NUM", "PYTORCH_", "CUDA_")
THEIRS += ("PET_", "SKYPILOT_", "NNODES", "MIN_NODES", "NODE_", "JOB_COMPLETION_INDEX")
ENV = {k: v for k, v in os.environ.items() if not k.startswith((*OURS, *THEIRS))}
ENV["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def call(script: str, *words: str, code: int = 0, cwd: Path = ROOT, **env: str) -> str:
    """Runs a launcher with the Python of the tests, unless `env` chooses one; returns stdout, or if `code` stderr."""
    if not env.keys() & {"MEGAPROMOE_ENV", "MEGAPROMOE_PYTHON"}:
        env["MEGAPROMOE_PYTHON"] = sys.executable
    command = ["bash", str(LAUNCHERS / f"{script}.sh"), *words]
    done = subprocess.run(command, env=ENV | env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def printed(script: str, *words: str, **env: str) -> dict[str, list[str]]:
    """The commands of a dry run by what they are: sbatch, node, check, train, and the exports."""
    commands: dict[str, list[str]] = {"export": []}
    for line in call(script, "--dry-run", *words, **env).splitlines():
        command = shlex.split(line)
        if command[0] == "export":
            commands["export"] += command[1:]
        elif command[0] == "srun":
            commands["node" if "bash" in command else command[command.index("megapromoe") + 1]] = command
        else:
            commands[Path(command[0]).name] = command
    return commands
