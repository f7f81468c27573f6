"""One row of numbers for each finished run of a study, from its metrics, its configuration and its last checkpoint."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megapromoe.io import write_text
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies import layouts
from megapromoe.studies.curves import figures, titled
from megapromoe.studies.grid import Task
from megapromoe.studies.hours import hours_of
from megapromoe.studies.json_files import metrics, read_json
from megapromoe.studies.recipe import StudyError, ranks_of
from megapromoe.studies.study import Study
from megapromoe.work_progress import Progress

DRAWS = 8192
EVALUATED = "evaluated: "  # prefix of the names of results from `megapromoe evaluate`
TAIL = 0.1  # share of the last steps, over which training losses are averaged

LOSS, TRAINING_LOSS = "fixed_loss", "training_loss"
ROUTING = ("load_entropy", "load_max_over_mean", "dead_experts")


def evaluate(study: Study, tasks: Iterable[Task], draws: int = DRAWS, jobs: int = 1) -> None:
    """Computes the missing losses of the last checkpoints of finished tasks, and writes them into the study.

    `jobs` of them at the same time, each in a process of its own if there are several.

    Raises StudyError for tasks whose checkpoint cannot be used, after all others are computed.
    """
    lacking = [task for task in tasks if study.done(task) and not evaluated(study, task, draws)]
    problems = []
    with Progress(len(lacking) * draws, "draw", "loss on fixed draws", enabled=bool(lacking)) as progress:
        if jobs == 1 or len(lacking) < 2:
            for number, task in enumerate(lacking):
                progress.note(task.name)
                problems.append(_compute_loss(study, task, draws, progress.update))
                progress.update((number + 1) * draws - progress.done)  # also counts failed and skipped tasks
        else:
            for number, problem in enumerate(_in_processes(study, lacking, draws, jobs), start=1):
                problems.append(problem)
                progress.update(draws)
                progress.note(f"{number} of {len(lacking)}")
    if violations := [problem for problem in problems if problem]:
        raise StudyError(violations)


def _in_processes(study: Study, tasks: list[Task], draws: int, jobs: int) -> Iterator[str | None]:
    """What `_compute_loss` returns for each task, in the order in which they end."""
    spawned = multiprocessing.get_context("spawn")  # a forked process cannot use threads or GPUs of its parent
    count = min(jobs, len(tasks))
    numbers = spawned.Queue()
    for number in range(count):
        numbers.put(number)
    with ProcessPoolExecutor(count, spawned, _begin, (numbers,)) as pool:
        try:
            for future in as_completed([pool.submit(_compute_loss, study, task, draws) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            rule = "a process was killed, perhaps because memory was full; take fewer jobs, and repeat the command"
            raise StudyError([f"--jobs {jobs}: {rule}"]) from error
        except BaseException:  # includes Ctrl-C, which the processes ignore
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(numbers: multiprocessing.Queue[int]) -> None:
    """Prepares a process: it leaves Ctrl-C to the command, and takes the GPU of its number, if there are GPUs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def _compute_loss(
    study: Study, task: Task, draws: int, progress: Callable[[int], None] = lambda count: None
) -> str | None:
    """Computes and writes the loss of a finished task; a sentence if its checkpoint or data cannot be used."""
    if evaluated(study, task, draws):  # another command has computed it in the meantime
        return None

    import torch  # slow to import; not needed if all losses are computed

    from megapromoe.distributed import runtime

    runtime.prepare()
    from megapromoe.checkpoint.format import CheckpointError
    from megapromoe.data.datasets import DatasetError
    from megapromoe.evaluation.heldout import objective_loss, open_held_out
    from megapromoe.sampling.run_model import initial_share_of, load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, config, step = load_model(study.run(task), weights=study.recipe.weights, device=device)
        dataset, split = open_held_out(config)
        mean, error = objective_loss(model, config, dataset, draws, progress=progress)
        share = initial_share_of(study.run(task), step, study.recipe.weights)
    except (CheckpointError, DatasetError, FloatingPointError, OSError) as problem:
        return f"{task.name}: {problem}"
    facts = {"step": step, "weights": study.recipe.weights, "split": split, "draws": draws}
    record = facts | {"loss": mean, "standard_error": error, "initial_share": share}
    write_text(study.loss_file(task), json.dumps(record) + "\n", parents=True, concurrent=True)
    return None


def evaluated(study: Study, task: Task, draws: int = DRAWS) -> bool:
    """Whether the loss of the last checkpoint of a task is computed."""
    return _known_loss(study, task, draws) is not None


def row(study: Study, task: Task, draws: int = DRAWS) -> dict[str, Any]:
    """The numbers of one finished task.

    `training_loss` is the denoising loss, which all routers have, averaged over the last tenth of the steps; routing
    statistics are averaged in the same way. `images_per_second` is the median over the run, `memory_bytes` the peak of
    rank 0. Values that a run does not have, such as the routing of a dense model, are None.

    Raises StudyError if there are no metrics, or if the loss on fixed draws is not computed.
    """
    lines = metrics(study.run(task))
    if not lines:
        raise StudyError([f"{study.run(task) / 'metrics.jsonl'}: has no metrics, although the last step is saved"])
    record = _known_loss(study, task, draws)
    if record is None:
        raise StudyError([f"{task.name}: its loss on fixed draws is not computed yet; run `collect`"])
    model, steps = task.config.model, task.config.train.steps
    tail = [line for line in lines if line["step"] > (1 - TAIL) * steps] or lines[-1:]
    count, flops = parameters(model), flops_per_image(model).training
    slots = len(model.moe_blocks) * model.num_experts
    dead, processes = _mean(tail, "dead_experts"), layouts.columns(study, task)
    return {
        "task": task.name,
        "variant": task.variant,
        "seed": task.seed,
        **task.point,
        "experts": model.num_experts if model.moe_blocks else None,
        "steps": steps,
        "images": task.images,
        "parameters": count.total,
        "active_parameters": count.active,
        "flops_per_image": flops,
        "training_flops": task.flops,
        LOSS: record["loss"],
        "fixed_loss_error": record["standard_error"],
        "split": record["split"],
        "weights": record["weights"],
        "initial_share": record.get("initial_share"),
        TRAINING_LOSS: _mean(tail, DENOISING_LOSS),
        **{name: _mean(tail, name) for name in ROUTING},
        "dead_share": dead / slots if slots and dead is not None else None,
        "images_per_second": _median(lines, "images_per_second"),
        "flops_per_second": _median(lines, "flops_per_second"),
        "gpu_hours": hours_of(lines, task, processes["ranks"] or ranks_of(study.recipe, task.variant)),
        "memory_bytes": max((line["memory_bytes"] for line in lines if line.get("memory_bytes")), default=None),
        **processes,
        **_evaluated(study, task),
    }


def _evaluated(study: Study, task: Task) -> dict[str, float]:
    """Results of `megapromoe evaluate` for the last checkpoint, with a name for each metric and guidance scale."""
    last = [record for record in figures(study, task) if record["step"] == study.steps_saved(task)]
    return {f"{EVALUATED}{titled(record)}, guidance {record['guidance']:g}": record["value"] for record in last}


def _known_loss(study: Study, task: Task, draws: int) -> dict[str, Any] | None:
    """The stored loss, if it was computed for the last checkpoint with these weights and this number of draws."""
    wanted = {"step": study.steps_saved(task), "weights": study.recipe.weights, "draws": draws}
    record = read_json(study.loss_file(task))
    return record if record is not None and wanted.items() <= record.items() else None


def _values(lines: list[dict], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None and math.isfinite(line[name])]


def _mean(lines: list[dict], name: str) -> float | None:
    values = _values(lines, name)
    return statistics.fmean(values) if values else None


def _median(lines: list[dict], name: str) -> float | None:
    values = _values(lines, name)
    return statistics.median(values) if values else None
