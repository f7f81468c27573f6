"""What `study submit` asks SLURM for: the resources of one task, from its ranks and the launcher that starts them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megapromoe.studies.recipe import Recipe, StudyError

GPUS_PER_NODE = 8  # where the options of sbatch say nothing else
CPUS_PER_RANK = 12  # as in launchers/scaling_experts.sh
# Launchers that start one process for each task of the job, on all its nodes; others start theirs on the first node.
_STARTS_TASKS = ("srun", "mpirun", "mpiexec")


def resources(recipe: Recipe, options: Sequence[str]) -> list[str]:
    """Options of sbatch for tasks of `recipe.ranks` ranks, one rank for each GPU; none for tasks of one rank.

    Args:
        options: those that the user gives to sbatch. They say how many nodes or GPUs of a node there are, and win
            over these because they come later on the command line.

    Raises StudyError where the ranks do not spread evenly over the nodes, or the launcher does not reach all nodes.
    """
    ranks = recipe.ranks
    if ranks == 1:
        return []
    most = _number(options, "--gpus-per-node") or _number(options, "--ntasks-per-node") or GPUS_PER_NODE
    nodes = _number(options, "--nodes", "-N") or -(-ranks // most)
    if ranks % nodes:
        even = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise StudyError([f"ranks = {ranks}: do not spread evenly over {nodes} nodes; give --nodes=N, N one of {even}"])
    on_node, launcher = ranks // nodes, Path(recipe.launcher[0]).name
    if launcher in _STARTS_TASKS:
        return [f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={on_node}", f"--gpus-per-node={on_node}"]
    if nodes > 1:
        raise StudyError(
            [
                f"launcher = {' '.join(recipe.launcher)!r}: starts processes on one node, but {ranks} ranks take"
                f" {nodes} nodes of {most} GPUs; plan the study with --launcher 'srun python', or give"
                f" --gpus-per-node={ranks}"
            ]
        )
    return ["--nodes=1", "--ntasks=1", f"--gpus-per-node={on_node}", f"--cpus-per-task={CPUS_PER_RANK * on_node}"]


def _number(options: Sequence[str], *names: str) -> int | None:
    """The last whole number that an option of sbatch has, written as NAME=8, NAME 8, or -N8; None without one."""
    found = None
    for option, following in pairwise([*options, ""]):
        for name in names:
            value = following if option == name else option.removeprefix(name).removeprefix("=").rpartition(":")[2]
            if option.startswith(name) and re.fullmatch(r"[1-9]\d*", value):
                found = int(value)
    return found
