"""The interactive plots of a study's report, by plotly: losses over steps, paired differences, metrics of images.

plotly reads some HTML in names and texts, so every text that comes from a user is escaped by `literal`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from megapromoe.plot_styles import Style
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.collect import LOSS
from megapromoe.studies.curves import figures, titled
from megapromoe.studies.grid import Task
from megapromoe.studies.image_plots import styles_of
from megapromoe.studies.json_files import metrics
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, groups, mean_of, model_name

MAX_POINTS = 400  # of a run's curve; a point is the mean of the lines that it stands for
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}  # matplotlib's line styles in plotly

Group = tuple[str, tuple]


def import_plotly() -> Any:
    """plotly's module of figures. Raises StudyError with the remedy if it is not installed."""
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise StudyError(["report: needs plotly: pip install 'megapromoe[report]'"]) from error
    return plotly.graph_objects


def literal(text: str) -> str:
    """A text for plotly, which would read tags and entities."""
    return html.escape(text, quote=False)


def arms(study: Study) -> dict[Group, list[Task]]:
    """The tasks that differ in the seed alone, in the order of the recipe."""
    rows = [{"task": task, "variant": task.variant, **task.point} for task in study.tasks]
    return {key: [row["task"] for row in group] for key, group in groups(rows, study.recipe).items()}


def loss_figure(study: Study) -> Any | None:
    """The denoising loss of each run over its steps; None before any run has logged."""
    go, everything = import_plotly(), arms(study)
    styles, figure = styles_of(study, everything), go.Figure()
    for key, tasks in everything.items():
        for task in tasks:
            lines = [line for line in metrics(study.run(task)) if is_finite(line.get(DENOISING_LOSS))]
            steps, losses = thinned([line["step"] for line in lines], [line[DENOISING_LOSS] for line in lines])
            if steps:
                figure.add_trace(go.Scatter(x=steps, y=losses, **_line(key, task, tasks[0], styles[key])))
    return _finished(figure, "step", "denoising loss of training") if figure.data else None


def difference_figure(study: Study, rows: Rows, against: str) -> Any | None:
    """Loss minus that of `against` on the same stream: each seed, and the mean with its 95 % interval.

    None without a pair of runs.
    """
    go = import_plotly()
    styles, figure = styles_of(study, arms(study)), go.Figure()
    partners = [row for row in rows if row["variant"] == against]
    for key, group in groups(rows, study.recipe).items():
        pairs = [] if key[0] == against else [(row, _partner(row, key[1], partners)) for row in group]
        values = [(row, row[LOSS] - other) for row, other in pairs if other is not None]
        if not values:
            continue
        name, colour = literal(model_name(*key)), styles[key].colour
        hover = [f"{literal(row['task'])}: {value:+.5f}" for row, value in values]
        points = {"mode": "markers", "marker": {"color": colour, "symbol": "circle-open"}, "showlegend": False}
        points |= {"hovertext": hover, "hoverinfo": "text"}
        figure.add_trace(go.Scatter(x=[value for _, value in values], y=[name] * len(values), **points))
        mean = mean_of(value for _, value in values)
        bar = {"type": "data", "array": [mean.half or 0.0], "thickness": 2, "width": 6}
        text = f"{name}: mean {mean:+} of {mean.runs} seeds"
        style = {"mode": "markers", "marker": {"color": colour, "size": 10}, "showlegend": False}
        figure.add_trace(go.Scatter(x=[mean.mean], y=[name], error_x=bar, hovertext=[text], hoverinfo="text", **style))
    if not figure.data:
        return None
    figure.add_vline(x=0, line_color="black", line_width=1)
    figure.update_yaxes(autorange="reversed")
    return _finished(figure, f"loss on fixed draws minus that of {literal(against)}, of the same seed", "")


def _partner(row: dict[str, Any], point: tuple, partners: Rows) -> float | None:
    """The loss of the runs of the baseline at the seed and point of a row; their mean if several match."""
    same = [o[LOSS] for o in partners if o["seed"] == row["seed"] and all(o.get(a, v) == v for a, v in point)]
    return sum(same) / len(same) if same else None


def evaluation_figures(study: Study) -> dict[str, Any]:
    """Title -> each metric of sampled images at each guidance scale over the steps, with a line for each run."""
    go, everything = import_plotly(), arms(study)
    styles = styles_of(study, everything)
    made: dict[str, Any] = {}
    for key, tasks in everything.items():
        for task in tasks:
            curves: dict[str, list[tuple[int, float]]] = {}
            for row in figures(study, task):
                if is_finite(row["value"]):
                    title = f"{titled(row)}, guidance {row['guidance']:g}"
                    curves.setdefault(title, []).append((row["step"], row["value"]))
            for title, points in curves.items():
                figure = made.setdefault(title, go.Figure())
                steps, values = zip(*sorted(points), strict=True)
                line = _line(key, task, tasks[0], styles[key]) | {"mode": "lines+markers"}
                figure.add_trace(go.Scatter(x=steps, y=values, **line))
    return {title: _finished(figure, "step", literal(title)) for title, figure in made.items()}


def is_finite(value: Any) -> bool:
    """Whether a value of metrics.jsonl is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thinned(steps: Sequence[int], values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """At most `most` points of a curve: means of neighbouring values, each at the last step of its part."""
    if len(steps) <= most:
        return list(steps), list(values)
    ends = [round(len(steps) * (i + 1) / most) for i in range(most)]
    parts = list(pairwise([0, *ends]))
    return [steps[end - 1] for _, end in parts], [sum(values[a:b]) / (b - a) for a, b in parts]


def _line(key: Group, task: Task, first: Task, style: Style) -> dict[str, Any]:
    """Arguments of a run's curve: one entry of the legend for all seeds of a model, the run's name at each point."""
    name = literal(model_name(*key))
    line = {"color": style.colour, "dash": DASHES.get(style.line, "solid"), "width": 1.5}
    text = f"{literal(task.name)}<br>step %{{x:,}}: %{{y:.5g}}<extra></extra>"
    legend = {"name": name, "legendgroup": name, "showlegend": task is first}
    return {"mode": "lines", "line": line, "hovertemplate": text, **legend}


def _finished(figure: Any, x: str, y: str) -> Any:
    figure.update_layout(
        template="plotly_white", height=460, margin={"l": 60, "r": 20, "t": 20, "b": 50}, hovermode="closest"
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def figure_html(made: Iterable[tuple[str, Any]]) -> list[str]:
    """The HTML of each named figure, without plotly's program, which a page needs once."""
    settings = {"displaylogo": False, "responsive": True}
    return [figure.to_html(full_html=False, include_plotlyjs=False, div_id=n, config=settings) for n, figure in made]
