"""Output of the records of an evaluation: a table, lines of JSON, a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.average import share_in_words
from megapromoe.checkpoint.weights import is_average
from megapromoe.evaluation.reference import EvaluationError
from megapromoe.io import append_text, atomic_write, open_regular
from megapromoe.plot_styles import assign
from megapromoe.plot_text import literal
from megapromoe.run_lines import lines_of


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A text with what was compared and a table with metrics in rows and sets of images in columns."""
    first = records[0]
    names = list(dict.fromkeys(name for record in records for name in record["figures"]))
    steps = _steps(records)
    heads = [[f"step {r['step']:,}" for r in records]] if len(steps) > 1 else []
    if "guidance" in first:
        heads.append([f"guidance {r['guidance']:g}" for r in records])
    real = "statistics only" if first["reference_count"] is None else f"{first['reference_count']:,} images"
    comparison = f"{first['count']:,} images"
    if steps:
        which = f"step {steps[0]:,}" if len(steps) == 1 else f"each of {len(steps)} steps"
        comparison += f" of {which} ({first['weights']} weights)"
    lines = [f"{comparison} against {first['reference']} ({real}), features of {first['features']['name']}"]
    lines += _initial(records)
    if first["features"]["declared"]:
        lines.append("the user declared these weights as those of the standard network; their hash is unknown")
    width = max(map(len, names))
    lines += [" " * width + "".join(f"  {head:>14}" for head in row) for row in heads]
    for name in names:
        lines.append(f"{name:{width}}" + "".join(f"  {r['figures'][name]:14.6g}" for r in records))
    return "\n".join(lines)


def _initial(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line with the share of the initial weights in the averaged weights; for several steps, the largest share."""
    if not all(is_average(record.get("weights", "")) and "initial_share" in record for record in records):
        return []
    shares = [record["initial_share"] for record in records]
    largest = None if None in shares else max(shares)
    return [f"averaged weights: {'at most ' if len(set(shares)) > 1 else ''}{share_in_words(largest)}"]


def append(records: Sequence[Mapping[str, Any]], file: Path) -> int:
    """Appends a line of JSON for each record to a file and returns how many were added.

    A record is not added if the newest line of the same request has the same metrics.

    Raises EvaluationError.
    """
    added = []
    try:
        before = b""
        if os.path.lexists(file):
            os.close(open_regular(file, os.O_RDONLY))  # refuses links and pipes before reading
            before = file.read_bytes()
        newest = {_request(line): _text(line.get("figures")) for line in lines_of(file)}
        for record in records:
            request, figures = _request(record), _text(record.get("figures"))
            if newest.get(request) != figures:
                newest[request] = figures
                added.append(json.dumps(record, ensure_ascii=False) + "\n")
        if added:
            line_end = "\n" if before and not before.endswith(b"\n") else ""
            append_text(file, line_end + "".join(added))
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be written ({error.strerror}); the figures are above") from error
    return len(added)


def _request(record: Mapping[str, Any]) -> str:
    """A record without its metrics and its time, as text."""
    return _text({name: value for name, value in record.items() if name not in ("figures", "time")})


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # text, because NaN != NaN


def plot(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plots the first metric, FID or the Fréchet distance, as a PNG file.

    The x axis is the guidance scale, or for several steps the step, with a line for each scale.

    Raises EvaluationError.
    """
    from matplotlib.axes import Axes  # slow to import
    from matplotlib.figure import Figure  # without a window system
    from matplotlib.ticker import MaxNLocator

    from megapromoe.plot_lines import Curve, draw_curves, height_of, name_ends

    name = next(iter(records[0]["figures"]))
    steps = _steps(records)
    over, other = ("step", "guidance") if len(steps) > 1 else ("guidance", "step")
    values = sorted({record[other] for record in records})
    figure = Figure(figsize=(6, height_of(len(values), 3.5)), layout="constrained")
    curves = []
    for value, style in assign(values).items():
        points = sorted((record[over], record["figures"][name]) for record in records if record[other] == value)
        x, y = zip(*points, strict=True)
        curves.append(Curve(x, y, f"{other} {value:g}", style))
    count = f"{records[0]['count']:,} images"
    title = f"{count} of each step" if len(steps) > 1 else f"step {steps[0]:,}, {count}"

    def finish(ax: Axes) -> None:
        ax.set(xlabel="step" if len(steps) > 1 else "guidance scale", ylabel=literal(name))
        ax.grid(alpha=0.3)
        if len(steps) > 1:
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))

    panels = draw_curves(figure, curves, title, finish)
    if len(steps) > 1:
        name_ends(panels)
    try:
        with atomic_write(file) as picture:
            figure.savefig(picture, format="png", dpi=150)
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be written ({error.strerror}); give another path") from error


def _steps(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps of the records, ascending; empty if existing images were evaluated."""
    return sorted({record["step"] for record in records if "step" in record})
