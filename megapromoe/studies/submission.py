"""What `study submit` asks SLURM for: arrays of jobs, and the resources of each from its ranks and their launcher.

Trainings are one array. Evaluations of trainings that are done are another; those of trainings that are submitted now
are a third, with the same numbers as the first: SLURM's `aftercorr` lets job I of it wait until job I of the first has
ended well, and removes it where that failed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megapromoe.studies.recipe import Recipe, StudyError
from megapromoe.studies.study import Study

GPUS_PER_NODE = 8  # where the options of sbatch say nothing else
CPUS_PER_RANK = 12  # as in launchers/scaling_experts.sh
# Launchers that start one process for each task of the job, on all its nodes; others start theirs on the first node.
_STARTS_TASKS = ("srun", "mpirun", "mpiexec")


@dataclass(frozen=True)
class ArrayJob:
    """An array of jobs for tasks of a study.

    Attributes:
        indices: of the tasks, ascending.
        evaluates: evaluations, else trainings.
        waits: each job waits for the training of the same task.
    """

    indices: tuple[int, ...]
    evaluates: bool = False
    waits: bool = False

    @property
    def words(self) -> list[str]:
        """Words behind the study's folder, for the job script."""
        return ["--evaluate"] if self.evaluates else []

    def sbatch(self, study: Study, options: Sequence[str], at_once: int | None, trainings: str) -> list[str]:
        """The command that submits it, up to the job script.

        Args:
            options: of sbatch, from the user.
            at_once: jobs of an array that run at a time; None: all.
            trainings: number of the job whose trainings are waited for.
        """
        array = f"--array={ranges(self.indices)}" + (f"%{at_once}" if at_once else "")
        words = ["sbatch", array, *resources(study.recipe, options), *options]
        return [*words, f"--dependency=aftercorr:{trainings}", "--kill-on-invalid-dep=yes"] if self.waits else words


def array_jobs(study: Study) -> list[ArrayJob]:
    """What is to be submitted, trainings first; nothing where all is done."""
    trainings = {task.index for task in study.missing()}
    evaluations = {evaluation.task.index for evaluation in study.missing_evaluations()}
    arrays = [
        ArrayJob(tuple(sorted(trainings))),
        ArrayJob(tuple(sorted(evaluations - trainings)), evaluates=True),
        ArrayJob(tuple(sorted(evaluations & trainings)), evaluates=True, waits=True),
    ]
    return [array for array in arrays if array.indices]


def submit(
    study: Study,
    arrays: Sequence[ArrayJob],
    script: Path,
    options: Sequence[str],
    at_once: int | None,
    environment: Mapping[str, str],
    dry_run: bool,
) -> int:
    """Prints the commands of sbatch and calls them; returns 0, or the exit code of the one that failed.

    Args:
        script: of the jobs.
        options, at_once: see `ArrayJob.sbatch`.
        environment: of sbatch, and so of the jobs.
        dry_run: print alone.

    Raises FileNotFoundError where there is no sbatch; StudyError.
    """
    logs, trainings = study.folder / "logs", "JOBID"
    for array in arrays:
        words = array.sbatch(study, options, at_once, trainings)
        words += [str(script), str(study.folder.resolve()), *array.words]
        print(shlex.join(words), flush=True)
        if dry_run:
            continue
        logs.mkdir(exist_ok=True)  # the jobs' own output goes there
        done = subprocess.run(words, cwd=logs, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return done.returncode
        if not array.evaluates:
            trainings = job_number(done.stdout, arrays)
    return 0


def job_number(output: str, arrays: Sequence[ArrayJob]) -> str:
    """The number of the job that sbatch has submitted. Raises StudyError if an array is to wait for it, and none is."""
    match = re.search(r"\d+", output)
    if match is None and any(array.waits for array in arrays):
        raise StudyError(
            ["sbatch: printed no number of a job for evaluations to wait for; submit again when the trainings are done"]
        )
    return match[0] if match else ""


def ranges(indices: Sequence[int]) -> str:
    """Indices as SLURM writes them: [0, 1, 2, 5] -> "0-2,5"."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], index]
        else:
            spans.append([index])
    return ",".join("-".join(map(str, ends)) for ends in spans)


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
    count = None
    for option, following in pairwise([*options, ""]):
        for name in names:
            value = following if option == name else option.removeprefix(name).removeprefix("=").rpartition(":")[2]
            if option.startswith(name) and re.fullmatch(r"[1-9]\d*", value):
                count = int(value)
    return count
