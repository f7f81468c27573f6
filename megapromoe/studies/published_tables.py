"""Tables of published figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megapromoe.studies import markdown
from megapromoe.studies.grid import Task
from megapromoe.studies.published import SIZES, Published, size_of
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, mean_of, model_name

NOT_COMPARABLE = (
    "This study has the small scale `{scale}`: other data, models and lengths than the recipe's. Published figures are"
    " not comparable with it, and are not shown."
)


def published_sections(study: Study, figure_rows: Rows) -> Iterator[str]:
    """Sections of results.md: the published figures of each model beside ours; none for a study without them.

    Args:
        figure_rows: results of `megapromoe evaluate`, of all finished tasks; see `curves.figures`.
    """
    if study.recipe.scale is not None:
        yield NOT_COMPARABLE.format(scale=study.recipe.scale)
    lines = list(_lines(study, figure_rows))
    if not lines:
        return
    yield "## Published figures beside ours"
    yield (
        "Ours: the mean over seeds with half of its 95 % interval, of evaluations at the published step, guidance and"
        " number of images. Published figures have no interval: the papers do not state the noise of their runs."
    )
    head = ["model", "figure", "steps", "guidance", "published", "ours", "seeds", "ours minus published", "source"]
    yield markdown.table([head, *lines])


def size_lines(study: Study) -> Iterator[str]:
    """Lines on published sizes and costs. Sizes are known for our models before they are trained."""
    for entry, tasks in _entries(study):
        for name, value in entry.figures.items():
            if entry.guidance is not None or not tasks:
                continue
            ours = f" {_number(size_of(tasks[0].config.model, name))}," if name in SIZES else ":"
            model = model_name(tasks[0].variant, tuple(tasks[0].point.items()))
            yield f"  {model}: {name}{ours} published {_number(value)} ({entry.source})"


def _lines(study: Study, figure_rows: Rows) -> Iterator[list[str]]:
    for entry, tasks in _entries(study):
        if not tasks:
            continue
        step = entry.step or tasks[0].config.train.steps
        for name, value in entry.figures.items():
            model = model_name(tasks[0].variant, tuple(tasks[0].point.items()))
            of_images = entry.guidance is not None
            where = [f"{step:,}" if of_images else "", f"{entry.guidance:g}" if of_images else ""]
            values = _ours(study, entry, tasks, name, step, figure_rows)
            cells = ["", "0", ""]
            if values:
                mean = mean_of(values)
                cells = [_number(mean.mean), "", f"{mean.mean - value:+.4g}"]
                if name not in SIZES:
                    cells[0] += "" if mean.half is None else f" ± {mean.half:.3g}"
                    cells[1] = str(mean.runs)
            elif name in SIZES or not of_images:
                cells[1] = ""
            yield [model, name, *where, _number(value), *cells, entry.source]


def _entries(study: Study) -> Iterator[tuple[Published, list[Task]]]:
    """Each published entry with the tasks of its model."""
    for variant in study.recipe.variants:
        for entry in variant.published:
            points = (task for task in study.tasks if task.variant == variant.name and task.point == entry.at)
            yield entry, list(points)


def _ours(
    study: Study, entry: Published, tasks: Sequence[Task], name: str, step: int, figure_rows: Rows
) -> list[float]:
    """Our values of a published figure: one for each seed that is evaluated, or the size of the model."""
    if name in SIZES:
        return [size_of(tasks[0].config.model, name)]
    evaluate = study.recipe.evaluate
    images = entry.images or (evaluate.num if evaluate is not None else None)
    wanted: dict[str, Any] = {"figure": name, "step": step, "guidance": entry.guidance, "count": images}
    names = {task.name for task in tasks}
    return [row["value"] for row in figure_rows if row["task"] in names and wanted.items() <= row.items()]


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) >= 1 else f"{value:.3g}"
