"""Submits a study to SLURM: arrays of jobs, with resources derived from the ranks and their launcher.

Trainings are the first array, and evaluations of finished trainings the second. Evaluations of trainings that are
submitted now are the third, with the same indices as the first: with SLURM's `aftercorr`, job I of it starts when job I
of the first has succeeded, and is removed if that failed. Tasks that need other resources, such as those of a variant
with more ranks, are arrays of their own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megapromoe.studies.placement import Placement, placement_of
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.study import Study

GPUS_PER_NODE = 8  # default, if the options of sbatch give no number
WORKING_DIRECTORY = "MEGAPROMOE_STUDY_CWD"  # which launchers/scaling_experts.sh enters
CPUS_PER_RANK = 12  # as in launchers/scaling_experts.sh


@dataclass(frozen=True)
class ArrayJob:
    """An array of jobs for tasks of a study.

    Attributes:
        indices: indices of the tasks, ascending.
        placement: the processes of each of its jobs.
        evaluates: whether the jobs are evaluations, not trainings.
        waits: whether each job waits for the training of the same task.
    """

    indices: tuple[int, ...]
    placement: Placement
    evaluates: bool = False
    waits: bool = False

    @property
    def words(self) -> list[str]:
        """Arguments of the job script after the study's folder."""
        return ["--evaluate"] if self.evaluates else []

    def sbatch(self, options: Sequence[str], at_once: int | None, trainings: str) -> list[str]:
        """The sbatch command of the array, without the job script.

        Args:
            options: options of sbatch from the user.
            at_once: number of jobs of an array that run at the same time; None: all.
            trainings: job id of the trainings to wait for.
        """
        array = f"--array={ranges(self.indices)}" + (f"%{at_once}" if at_once else "")
        words = ["sbatch", array, *resources(self.placement, options), *options]
        return [*words, f"--dependency=aftercorr:{trainings}", "--kill-on-invalid-dep=yes"] if self.waits else words


def array_jobs(study: Study, kind: str = "") -> list[ArrayJob]:
    """The arrays to submit, trainings before the evaluations that wait for them; empty if everything is done.

    Args:
        kind: "train": only trainings; "evaluate": only evaluations of tasks that are trained; "": all.
    """
    trainings = {task.index for task in study.missing()}
    evaluations = {job.task.index: job for job in study.missing_evaluations()}
    by_placement: dict[Placement, list[int]] = {}  # of the training: those of its evaluation follow from it
    for task in study.tasks:
        by_placement.setdefault(placement_of(study.recipe, task), []).append(task.index)
    arrays = []
    for placement, indices in by_placement.items():
        of_evaluations = [placement_of(study.recipe, evaluations[index]) for index in indices if index in evaluations]
        evaluates = of_evaluations[0] if of_evaluations else placement
        parts = [ArrayJob(tuple(index for index in indices if index in trainings), placement)]
        trained = tuple(index for index in indices if index in evaluations and index not in trainings)
        parts.append(ArrayJob(trained, evaluates, evaluates=True))
        untrained = tuple(index for index in indices if index in evaluations and index in trainings)
        parts.append(ArrayJob(untrained, evaluates, evaluates=True, waits=True))
        arrays += [part for part in parts if part.indices]
    if kind == "train":
        return [array for array in arrays if not array.evaluates]
    if kind == "evaluate":
        return [array for array in arrays if array.evaluates and not array.waits]
    return arrays


def submit(
    study: Study,
    arrays: Sequence[ArrayJob],
    script: Path,
    options: Sequence[str],
    at_once: int | None,
    environment: Mapping[str, str],
    dry_run: bool,
    evaluation_options: Sequence[str] = (),
    words: Sequence[str] = (),
) -> int:
    """Prints and runs the sbatch commands; returns 0, or the exit code of the first that failed.

    Args:
        script: the job script.
        options, at_once: see `ArrayJob.sbatch`.
        environment: environment of sbatch, which the jobs inherit. They start in the working directory of this
            process, to which the paths in a study are relative.
        dry_run: only print the commands.
        evaluation_options: more options of sbatch for the evaluations, which take precedence.
        words: more arguments of the job script.

    Raises FileNotFoundError if there is no sbatch; StudyError.
    """
    logs, trainings = study.folder / "logs", "JOBID"
    environment = {**environment, WORKING_DIRECTORY: str(Path.cwd())}
    for array in arrays:
        given = [*options, *evaluation_options] if array.evaluates else list(options)
        command = array.sbatch(given, at_once, trainings)
        command += [str(script), str(study.folder.resolve()), *array.words, *words]
        print(shlex.join(command), flush=True)
        if dry_run:
            continue
        logs.mkdir(exist_ok=True)  # working directory, for the output files of the jobs
        done = subprocess.run(command, cwd=logs, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return done.returncode
        if not array.evaluates:
            trainings = job_number(done.stdout, arrays)
    return 0


def job_number(output: str, arrays: Sequence[ArrayJob]) -> str:
    """The job id in the output of sbatch. Raises StudyError if there is none and another array must wait for it."""
    match = re.search(r"\d+", output)
    if match is None and any(array.waits for array in arrays):
        raise StudyError(
            ["sbatch: printed no job id, which the evaluations need; submit again when the trainings are done"]
        )
    return match[0] if match else ""


def ranges(indices: Sequence[int]) -> str:
    """Indices in the notation of SLURM: [0, 1, 2, 5] -> "0-2,5"."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], index]
        else:
            spans.append([index])
    return ",".join("-".join(map(str, ends)) for ends in spans)


def resources(placement: Placement, options: Sequence[str]) -> list[str]:
    """Options of sbatch for jobs of several ranks, one rank for each GPU; none for jobs of one rank.

    Args:
        options: options of sbatch from the user. They may set the number of nodes or GPUs of a node, and take
            precedence over the recipe because they are later on the command line.

    Raises StudyError if the ranks do not divide evenly over the nodes, or if the launcher does not reach all nodes.
    """
    ranks = placement.ranks
    if ranks == 1:
        return []
    given = _number(options, "--gpus-per-node") or _number(options, "--ntasks-per-node")
    most = given or placement.gpus_per_node or GPUS_PER_NODE
    nodes = _number(options, "--nodes", "-N") or placement.nodes or -(-ranks // most)
    if ranks % nodes:
        even = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise StudyError([f"ranks = {ranks}: do not divide evenly over {nodes} nodes; give --nodes=N, N one of {even}"])
    on_node = ranks // nodes
    if not placement.is_local:
        return [f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={on_node}", f"--gpus-per-node={on_node}"]
    if nodes > 1:
        raise StudyError(
            [
                f"launcher = {' '.join(placement.launcher)!r}: starts processes only on one node, but {ranks} ranks"
                f" take {nodes} nodes of {most} GPUs; plan the study with --launcher 'srun python', or give"
                f" --gpus-per-node={ranks}"
            ]
        )
    return ["--nodes=1", "--ntasks=1", f"--gpus-per-node={on_node}", f"--cpus-per-task={CPUS_PER_RANK * on_node}"]


def _number(options: Sequence[str], *names: str) -> int | None:
    """The last whole number given for an option of sbatch, as NAME=8, NAME 8, or -N8; None if it is not given."""
    count = None
    for option, following in pairwise([*options, ""]):
        for name in names:
            value = following if option == name else option.removeprefix(name).removeprefix("=").rpartition(":")[2]
            if option.startswith(name) and re.fullmatch(r"[1-9]\d*", value):
                count = int(value)
    return count
