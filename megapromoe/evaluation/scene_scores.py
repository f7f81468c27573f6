"""The six tasks of `scene_tasks.py` on pictures that a run generates: shares of right pictures, and of the ceiling.

The ranks generate the pictures together, as for other image metrics, and each reads an equal part of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megapromoe.config.options import Config
from megapromoe.data.latents import read_manifest
from megapromoe.data.scenes.recorded import holds_scenes
from megapromoe.distributed import runtime, watchdog
from megapromoe.distributed.agreement import (
    all_reduce_sum,
    broadcast_from_rank0,
    distributed_session,
    raising_together,
)
from megapromoe.evaluation.image_metrics import Evaluation, generate_sets_of_steps
from megapromoe.evaluation.names import RIGHT, SCENES
from megapromoe.evaluation.reference import EvaluationError
from megapromoe.evaluation.scene_reader import BLOCK, SceneReader
from megapromoe.evaluation.scene_tasks import TASKS, Counts, Prompt, ceiling, overall, prompts_in_turn, scores
from megapromoe.sampling.image_sets import ImageSet
from megapromoe.sampling.prompts import prompt_of
from megapromoe.work_progress import Progress

OVERALL = "overall"
HELD_OUT, IN_TRAINING = "held-out", "seen"  # what the prompts combine: words as in no scene of training, or as in some


def evaluate_scenes(
    evaluation: Evaluation, launch: runtime.LaunchEnvironment, held_out: bool = True
) -> list[dict[str, Any]]:
    """Scores a run on the six tasks and returns a record for each set of pictures, as `image_metrics.evaluate` does.

    Called on every rank without a process group. The pictures of a set are those of `prompts_in_turn`. Beside
    `figures`, the shares of right pictures, a record has `right`, the counts of each task, and `ceiling`, those of
    real scenes.

    Args:
        evaluation: its request has the number of pictures of a set, and no prompts.
        held_out: combinations that training never shows; otherwise those that it shows.

    Raises EvaluationError for a run on other data, SampleError, ImageSetError or ConfigError on every rank. Generated
    pictures are kept.
    """
    request = evaluation.request
    if request is None:
        raise ValueError("the six tasks need a run")
    shown = prompts_in_turn(request.num, held_out)
    request = replace(request, num=1, prompts=tuple(prompt_of(p.text) for p in shown))
    config = request.checked(launch.world)
    with distributed_session(launch, config.train.timeout, config.train.step_timeout) as device:
        with raising_together(EvaluationError):
            check_trains_on_scenes(request.run, config)
            if len(shown) < len(TASKS):
                raise EvaluationError(f"--num-images {len(shown)}: is too few for {len(TASKS)} tasks; give more")
        sets = generate_sets_of_steps(evaluation, request, config, launch, device)
        watchdog.at("reading real scenes", extra=math.inf)
        real: Counts = broadcast_from_rank0(ceiling(held_out=held_out) if launch.rank == 0 else {})
        records = []
        for images, metadata in sets:
            right = _read(images, shown, launch, device)
            shares = {OVERALL: overall(right)} | {task: count / total for task, (count, total) in right.items()}
            records.append(
                {
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    **metadata,
                    "prompts": HELD_OUT if held_out else IN_TRAINING,
                    "count": len(images),
                    "asked": {"reference": SCENES, "split": evaluation.split, "features": None},
                    "reference": "real scenes",
                    "reference_count": sum(total for _, total in real.values()),
                    "features": {"name": "scene reader"},
                    "figures": {f"{RIGHT}{name}": share for name, share in shares.items()},
                    "right": right,
                    "ceiling": real,
                }
            )
    return records


def check_trains_on_scenes(run: Path, config: Config) -> None:
    """Raises EvaluationError if a run was not trained on scenes."""
    data = config.data
    if data.source != "latents" or not holds_scenes(read_manifest(Path(data.path))):
        raise EvaluationError(
            f"{run}: is a model with model.condition = 'text' that was not trained on scenes, and this command scores"
            " texts on scenes only; generate images of prompts with megapromoe sample --prompts, or --geneval"
        )


def _read(images: ImageSet, shown: Sequence[Prompt], launch: runtime.LaunchEnvironment, device: torch.device) -> Counts:
    """The counts of all tasks. Collective: each rank reads every so many blocks."""
    watchdog.at(f"reading {images.path.name}")
    counts = torch.zeros(len(TASKS), 2, dtype=torch.int64)
    with raising_together(EvaluationError):
        reader, starts = SceneReader(), range(launch.rank * BLOCK, len(images), launch.world * BLOCK)
        with Progress(len(images), "picture", f"reading {images.path.name}", enabled=launch.rank == 0) as progress:
            for start in starts:
                stop = min(start + BLOCK, len(images))
                for task, (right, total) in scores(shown[start:stop], images.read(start, stop), reader).items():
                    counts[TASKS.index(task)] += torch.tensor([right, total])
                progress.update(min(launch.world * BLOCK, len(images) - start))  # assumes equally fast ranks
                watchdog.touch()
    rows = all_reduce_sum(counts.to(device)).tolist()
    return {task: (right, total) for task, (right, total) in zip(TASKS, rows, strict=True)}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for each set of pictures: right pictures of each task, and as a share of the ceiling."""
    return "\n\n".join(f"{_heading(record)}\n\n{_table(record)}" for record in records)


def _heading(record: Mapping[str, Any]) -> str:
    sampler = record["sample"]
    how = f"{sampler['method']}, {sampler['steps']} steps, guidance {record['guidance']:g}"
    what = f"{record['count']:,} pictures of step {record['step']:,} ({record['weights']} weights; {how})"
    return f"{what}, prompts of {record['prompts']} combinations"


def _table(record: Mapping[str, Any]) -> str:
    lines = ["| task | pictures | right | % | standard error | real scenes, % | share of the ceiling, % |"]
    lines.append("|---|---|---|---|---|---|---|")
    right, real = record["right"], record["ceiling"]
    for task in TASKS:
        (count, total), (real_count, real_total) = right[task], real[task]
        share, most = count / total, real_count / real_total
        error = math.sqrt(share * (1 - share) / total)
        cells = (task, str(total), str(count), *(f"{100 * x:.1f}" for x in (share, error, most, share / most)))
        lines.append(f"| {' | '.join(cells)} |")
    share, most = overall(right), overall(real)
    return "\n".join([*lines, f"| {OVERALL} | | | {100 * share:.1f} | | {100 * most:.1f} | {100 * share / most:.1f} |"])


def share_of_ceiling(record: Mapping[str, Any], task: str) -> float:
    """The share of right pictures of a task, divided by that of real scenes."""
    (count, total), (real_count, real_total) = record["right"][task], record["ceiling"][task]
    return count * real_total / (total * real_count)
