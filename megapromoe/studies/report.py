"""The report of a study: one HTML file with tables and interactive plots, which needs no network.

The report can be made at any time, also while tasks run. Losses on fixed draws are those that `collect` has computed.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megapromoe.io import write_text
from megapromoe.studies.attempts import attempts_of, process_seconds
from megapromoe.studies.collect import LOSS, TRAINING_LOSS
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.grid import Task
from megapromoe.studies.job_processes import flops_of, units, units_done
from megapromoe.studies.multiple_comparisons import count_in_words, warning
from megapromoe.studies.noise import noise_floors, sentence
from megapromoe.studies.placement import placement_of
from megapromoe.studies.report_figures import (
    arms,
    difference_figure,
    evaluation_figures,
    figure_html,
    import_plotly,
    loss_figure,
)
from megapromoe.studies.seed_statistics import differences
from megapromoe.studies.status import STATES, JobState
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, groups, mean_of, model_name
from megapromoe.work_progress import duration

STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 } th, td { padding: .2em .7em; text-align: left; }
tr { border-bottom: 1px solid #ddd } td.number { text-align: right; font-variant-numeric: tabular-nums }
.failed { color: #a00 } .note { color: #666 }"""
# No address is reachable from the page, whatever it contains. plotly sets styles, and makes pictures as blobs.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:;"
    " form-action 'none'; base-uri 'none'"
)


class Cell(str):
    """HTML of a table's cell, which is written as it is; any other text is escaped."""


def write_report(study: Study, rows: Rows, states: Sequence[JobState], against: Sequence[str], out: Path) -> None:
    """Writes the report. Raises StudyError without plotly, and OSError.

    Args:
        rows: of the tasks whose loss is known, as `collect.row` makes them.
        states: of all jobs.
        against: variants with which the others are compared.
        out: the HTML file.
    """
    import_plotly()
    from plotly.offline import get_plotlyjs

    parts = [part for part in sections(study, rows, states, against, out) if part]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>{_text(study.folder.resolve().name)}</title><style>{STYLE}</style>"
    head += f"<script>{get_plotlyjs()}</script>"
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_text(out, page, parents=True)


def sections(study: Study, rows: Rows, states: Sequence[JobState], against: Sequence[str], out: Path) -> Iterable[str]:
    """The parts of the page, in order."""
    yield f"<h1>Study {_text(study.folder.resolve().name)}</h1>"
    yield _summary(study, states)
    floors = noise_floors(rows, study.recipe)
    if floors:
        yield "<h2>Noise floor</h2>" + "".join(f"<p>{_text(sentence(floor))}</p>" for floor in floors)
    yield "<h2>Models</h2>" + _arms_table(study, rows)
    losses = loss_figure(study)
    yield "<h2>Losses over training</h2>" + (
        "".join(figure_html([("losses", losses)]))
        if losses is not None
        else '<p class="note">No run has logged a step yet.</p>'
    )
    for number, name in enumerate(against):
        figure = difference_figure(study, rows, name)
        if figure is not None:
            yield f"<h2>Against {_text(name)}, on the same stream</h2>"
            yield "<p>Rings: each seed. Points: mean with the 95 % interval over seeds (Student's t).</p>"
            yield from figure_html([(f"differences-{number}", figure)])
            yield "".join(f"<p>{_text(text)}</p>" for text in _cautions(study, rows, name))
    evaluated = evaluation_figures(study)
    if evaluated:
        yield "<h2>Sampled images</h2>"
    for number, (title, figure) in enumerate(evaluated.items()):
        yield f"<h3>{_text(title)}</h3>"
        yield from figure_html([(f"evaluation-{number}", figure)])
    yield _troubles(study, states)
    yield "<h2>Runs</h2>" + _runs_table(study, states, out)


def _cautions(study: Study, rows: Rows, against: str) -> list[str]:
    """How many differences of the loss exclude zero, plain and adjusted, and a warning if that is not the same."""
    means = {
        model_name(*arm): mean for arm, mean in differences(rows, study.recipe, against).items() if arm[1] is not None
    }
    p_values = [mean.p for mean in means.values()]
    texts = (count_in_words(p_values), warning(list(means), p_values).replace("**", ""))
    return [text for text in texts if text]


def _summary(study: Study, states: Sequence[JobState]) -> str:
    counts = {state: sum(s.state == state for s in states) for state in STATES}
    trainings = [(state.job, state.done) for state in states if isinstance(state.job, Task)]
    steps = sum(done for _, done in trainings), sum(task.config.train.steps for task, _ in trainings)
    flops = sum(flops_of(task, done) for task, done in trainings)
    hours = _process_hours(study, states)
    lines = [
        ("jobs", ", ".join(f"{count} {state}" for state, count in counts.items() if count)),
        ("training steps", f"{steps[0]:,} of {steps[1]:,}"),
        ("training operations so far", f"{flops:.3g} FLOPs"),
        ("process hours", f"{hours:.3g}, of all starts of trainings and evaluations, times their ranks"),
        ("seeds", ", ".join(map(str, study.recipe.seeds))),
        ("weights", study.recipe.weights),
        ("report", f"{datetime.now(UTC).isoformat(timespec='minutes')}, {study.folder.resolve()}"),
    ]
    return _table(["", ""], lines)


def _process_hours(study: Study, states: Sequence[JobState]) -> float:
    """Hours of all ended starts of these jobs, times the ranks of each job."""
    seconds = (process_seconds(attempts_of(study, s.job)) * placement_of(study.recipe, s.job).ranks for s in states)
    return sum(seconds) / 3600


def _arms_table(study: Study, rows: Rows) -> str:
    """A row for each model: seeds, parameters, losses, cost."""
    head = ["model", "seeds done", "parameters", "active", "training FLOPs", "loss", "training loss", "images/s"]
    known = groups(rows, study.recipe)
    lines: list[list[Any]] = []
    for key, tasks in arms(study).items():
        group = known.get(key, [])
        line: list[Any] = [model_name(*key), f"{len(group)} of {len(tasks)}"]
        if group:
            first = group[0]
            line += [f"{first['parameters']:,}", f"{first['active_parameters']:,}", f"{first['training_flops']:.3g}"]
            line.append(str(mean_of(row[LOSS] for row in group)))
            for name, form in ((TRAINING_LOSS, "{:.4f}"), ("images_per_second", "{:,.0f}")):
                values = [row[name] for row in group if row[name] is not None]
                line.append(form.format(sum(values) / len(values)) if values else "-")
        else:
            line += ["-"] * (len(head) - 2)
        lines.append(line)
    note = "Losses: of the last checkpoints on fixed draws, mean over seeds ± half of the 95 % interval."
    waiting = [task.name for task in study.finished() if task.name not in {row["task"] for row in rows}]
    if waiting:
        note += f" Without those that `collect` has not computed yet: {', '.join(waiting)}."
    return _table(head, lines, numbers=range(1, len(head))) + f'<p class="note">{_text(note)}</p>'


def _troubles(study: Study, states: Sequence[JobState]) -> str:
    """A table of the jobs that failed, were stopped, or needed several starts; "" without any."""
    lines = []
    for state in states:
        attempts = attempts_of(study, state.job)
        if state.state in ("failed", "stopped") or len(attempts) > 1:
            kind = Cell(f'<span class="{state.state}">{state.state}</span>')
            lines.append([state.job.name, kind, max(1, len(attempts)), state.remark])
    return "<h2>Failed and repeated jobs</h2>" + _table(["job", "state", "starts", "remark"], lines) if lines else ""


def _runs_table(study: Study, states: Sequence[JobState], out: Path) -> str:
    lines = []
    for state in states:
        job = state.job
        run = study.run(job.task if isinstance(job, Evaluation) else job)
        links = [_link(path, text, out) for path, text in ((run, "run"), (study.log(job), "log")) if path.exists()]
        age = "-" if state.age is None else f"{duration(state.age)} ago"
        progress = f"{units_done(study, job):,} of {units(job):,}"
        lines.append([job.name, state.state, progress, age, Cell(" ".join(links))])
    return _table(["job", "state", "steps or checkpoints", "last line", "files"], lines, numbers=[2])


def _link(path: Path, text: str, out: Path) -> str:
    """A link relative to the report, so that both can be moved or copied together."""
    relative = os.path.relpath(path.resolve(), out.resolve().parent)
    return f'<a href="{html.escape(quote(relative))}">{_text(text)}</a>'


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    """An HTML table; columns in `numbers` are aligned as numbers."""
    right = set(numbers)
    rows = []
    for line in lines:
        cells = [f"<td{' class=number' if i in right else ''}>{_text(cell)}</td>" for i, cell in enumerate(line)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = "".join(f"<th>{_text(name)}</th>" for name in head) if any(head) else ""
    return f"<table>{f'<tr>{header}</tr>' if header else ''}{''.join(rows)}</table>"


def _text(value: Any) -> str:
    """A value as HTML: escaped, unless it is a `Cell`."""
    return value if isinstance(value, Cell) else html.escape(str(value))
