"""Writes the result files of a study, and explains which expected files are not written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from megapromoe.io import write_text
from megapromoe.studies.collect import row
from megapromoe.studies.curves import figures, several_steps
from megapromoe.studies.difference_tables import difference_rows
from megapromoe.studies.early_decisions import decision_sections
from megapromoe.studies.figure_tables import mean_figures, mean_sections
from megapromoe.studies.grid import Task
from megapromoe.studies.hours import hours_sections
from megapromoe.studies.joint_law_tables import joint_law_sections
from megapromoe.studies.measurements import write_measurements
from megapromoe.studies.noise import noise_floors, noise_rows, noise_sections
from megapromoe.studies.published_tables import published_sections
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, to_csv, to_markdown

PICTURES = ("differences", "loss_experts", "loss_compute", "routing", "cost", "images", "evaluations")


def write_results(study: Study, done: Sequence[Task], draws: int, against: Sequence[str]) -> tuple[str, list[str]]:
    """Writes the tables of finished tasks; returns the text of results.md, and a line for each expected file.

    Args:
        draws: of the loss on fixed draws, which is known for each.
        against: variants to compare with.
    """
    rows = [row(study, task, draws) for task in done]
    figure_rows = [figure for task in done for figure in figures(study, task)]
    missing = [f"{task.name} ({study.state(task)})" for task in study.tasks if task not in done]
    means, noise = mean_sections(rows, study.recipe, figure_rows), noise_sections(rows, study.recipe)
    parts = chain(means, published_sections(study, figure_rows))
    text = to_markdown(rows, study.recipe, missing, against, figure_rows, parts, noise)
    more = [*decision_sections(study), *joint_law_sections(rows, study.recipe), *hours_sections(study, rows)]
    text = "\n\n".join([text.rstrip("\n"), *more]) + "\n"
    contents = {"results.csv": to_csv(rows), "results.md": text}
    if floors := noise_floors(rows, study.recipe):
        contents["noise.csv"] = to_csv(noise_rows(floors))
    if pairs := difference_rows(rows, study.recipe, against):
        contents["differences.csv"] = to_csv(pairs)
    if figure_rows:
        contents["evaluations.csv"] = to_csv(mean_figures(figure_rows, study.recipe))
    if several_steps(figure_rows):
        contents["curves.csv"] = to_csv(figure_rows)
    for name, content in contents.items():
        write_text(study.folder / name, content, parents=True)
    measured, missing_files = write_measurements(study)
    no_figures = why_no_figures(study, rows, figure_rows)
    no_noise = (
        "no model has two seeds that are done; add seeds to the recipe" if rows else "no task is done and collected"
    )
    reasons = {
        "differences.csv": "no other model has a run on a seed of the baseline",
        "noise.csv": no_noise if rows else "no task is done and collected",
        "evaluations.csv": no_figures,
        "curves.csv": no_figures or why_no_curves(study),
        **missing_files,
    }
    return text, report_files(study, [*(study.folder / name for name in contents), *measured], reasons)


def report_pictures(study: Study, rows: Rows, drawn: Sequence[Path]) -> list[str]:
    """A line for each plot of `plot`: its path, or the reason why it is not written."""
    done = {row["task"] for row in rows}
    figure_rows = [figure for task in study.tasks if task.name in done for figure in figures(study, task)]
    no_figures = why_no_figures(study, rows, figure_rows)
    nothing = "no task is done and collected" if not rows else None
    no_routing = "no task that is done has experts" if not any(row["experts"] for row in rows) else None
    counts = len({row["experts"] for row in rows if row["experts"]})
    reasons = {
        "differences": nothing or "no other model has a run on a seed of the baseline",
        "loss_experts": nothing or f"it needs tasks of two numbers of experts, and there {_are(counts)}",
        "routing": nothing or no_routing,
        "images": no_figures,
        "evaluations": no_figures or why_no_curves(study),
    }
    return report_files(study, drawn, {f"{name}.png": reasons.get(name) or nothing for name in PICTURES})


def why_no_figures(study: Study, rows: Rows, figure_rows: Rows) -> str | None:
    """The reason why there are no metrics of sampled images; None if there are some."""
    if figure_rows:
        return None
    if not rows:
        return "no task is done and collected"
    if study.recipe.evaluate is not None:
        return f"no evaluation is done; run `megapromoe study run {study.folder}`"
    task = f"{study.folder / 'runs' / rows[0]['task']}"
    by_hand = f"evaluate runs by hand: megapromoe evaluate --run-dir {task} --num-images N"
    return f"no images were evaluated; add a section `evaluate` to the recipe, or {by_hand}"


def why_no_curves(study: Study) -> str:
    """The reason why there is no curve of metrics over training."""
    if study.recipe.evaluate is None:
        return "no task was evaluated at two steps; `evaluate: {every: N}` in a recipe does that"
    if not study.recipe.evaluate.every:
        return "the recipe evaluates the last checkpoint alone; `evaluate: {every: N}` makes it several"
    return "no task is evaluated at two steps yet"


def report_files(study: Study, written: Sequence[Path], reasons: Mapping[str, str | None]) -> list[str]:
    """A line for each file: its path, or the reason why it is not written."""
    lines = [str(path) for path in written]
    for name, reason in reasons.items():
        path = study.folder / name
        if path not in written:
            older = "; the file that is there is older" if path.exists() else ""
            lines.append(f"{path}: not written: {reason or 'there is nothing to show'}{older}")
    return lines


def _are(count: int) -> str:
    return "is one" if count == 1 else "are none"
