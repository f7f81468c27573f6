"""A report of a run on scenes: report.json, report.md and a picture of prompts with what they show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.data.caption_sheet import caption_sheet
from megapromoe.diffusion.image_grid import write_png
from megapromoe.evaluation.loss_plot import draw_losses
from megapromoe.evaluation.report import facts_of_run, logged_lines, page_of_rows, row_of_machine, rows_of_training
from megapromoe.evaluation.scene_reader import SceneReader
from megapromoe.evaluation.scene_scores import HELD_OUT, table
from megapromoe.evaluation.scene_tasks import TASKS, is_right, prompts_in_turn
from megapromoe.io import write_json, write_text
from megapromoe.sampling.image_sets import ImageSet
from megapromoe.sampling.run_model import run_config

COLUMNS = 6  # pictures of each task in the sheet
SAMPLES, LOSS = "samples.png", "loss.png"


def write_scene_report(
    run: Path, record: Mapping[str, Any], timings: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Writes samples.png, loss.png, report.json and report.md into the run directory.

    Args:
        run: the run directory.
        record: of `scene_scores.evaluate_scenes`, for this run; its pictures exist.
        timings: seconds of earlier work, by name, to include in the report.

    Returns:
        the content of report.json.

    Raises ReportError without metrics, ImageSetError without pictures; also what `run_config` raises.
    """
    directory, config = RunDirectory(run), run_config(run)
    lines = logged_lines(directory)
    report = facts_of_run(directory, config, record["step"], lines, timings or {})
    report |= {"scores": dict(record), "picture": SAMPLES}
    write_png(directory.folder / SAMPLES, sheet(record))
    if draw_losses(lines, config, directory.folder / LOSS):
        report["loss_picture"] = LOSS
    write_json(directory.folder / "report.json", report, indent=2)
    write_text(directory.folder / "report.md", markdown(report))
    return report


def sheet(record: Mapping[str, Any]) -> np.ndarray:
    """The first pictures of a set, above their prompts and whether they are right: uint8 (height, width, 3).

    A row has the first pictures of one task.
    """
    images = ImageSet(Path(record["images"]))
    columns = min(COLUMNS, len(images) // len(TASKS))
    count = columns * len(TASKS)
    shown = prompts_in_turn(count, record["prompts"] == HELD_OUT)
    pictures = images.read(0, count)
    right = [is_right(p.stated, digits) for p, digits in zip(shown, SceneReader().read(pictures), strict=True)]
    # The prompts are in turn over the tasks: a task has every sixth.
    order = [column * len(TASKS) + task for task in range(len(TASKS)) for column in range(columns)]
    captions = [f"{shown[i].text}: {'right' if right[i] else 'wrong'}" for i in order]
    return np.asarray(caption_sheet([pictures[i] for i in order], captions, columns))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    page = page_of_rows(report, [*rows_of_training(report), row_of_machine(report)])
    page += ["", "## Six tasks", "", table([report["scores"]])]
    if "loss_picture" in report:
        page += ["", "## Training", "", f"![denoising loss over steps and over hours]({report['loss_picture']})"]
    page += ["", "## Samples", "", f"![the first pictures of each task above their prompts]({report['picture']})"]
    return "\n".join(page) + "\n"
