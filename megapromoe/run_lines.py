"""Lines of JSON that a run leaves: metrics.jsonl and evaluation.jsonl, and the names of its losses.

`denoising_loss` is the loss of the objective, which all models share and by which they are compared. `total_loss` is
what is differentiated: the denoising loss and auxiliary parts, each of which has a name of its own, with its weight.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DENOISING_LOSS, TOTAL_LOSS = "denoising_loss", "total_loss"
# The parts of the total beside the denoising loss, by the name that a router gives them.
AUXILIARY_LOSSES = {
    "rcl": "contrastive_loss",
    "balance": "balance_loss",
    "classification": "classification_loss",
    "capacity": "capacity_loss",
}
LOSSES = (DENOISING_LOSS, *AUXILIARY_LOSSES.values(), TOTAL_LOSS)
# Names in metrics.jsonl until version 0.1: `loss` was the total.
_FORMER_NAMES = {"loss": TOTAL_LOSS, "denoising": DENOISING_LOSS, **AUXILIARY_LOSSES}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, if there is one; what a killed run left of a line is passed over.

    A pipe, or a folder of that name, has no lines. Raises OSError if the file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # removed meanwhile
        return []
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                lines.append(value)
    return lines


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order, under the names of today whatever version wrote each."""
    return [current_names(line) for line in lines_of(path)]


def former_lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, under the names of today, if an earlier version wrote all of them; else none."""
    lines = lines_of(path)
    return [current_names(line) for line in lines] if all("loss" in line for line in lines) else []


def current_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with the names of today: a run that was resumed may have lines of both kinds."""
    return {_FORMER_NAMES.get(name, name): value for name, value in line.items()}


def elapsed_seconds(lines: Iterable[Mapping[str, Any]], global_batch: int) -> list[float]:
    """Seconds of training up to each line, over all starts of the run, ascending.

    Lines of earlier versions have no clock: theirs are estimated by the images and the speed of each, without start-up,
    saving and sampling.
    """
    elapsed, step, times = 0.0, 0, []
    for line in lines:
        if line.get("elapsed_seconds") is not None:
            elapsed = max(elapsed, line["elapsed_seconds"])
        elif speed := line.get("images_per_second"):
            elapsed += (line["step"] - step) * global_batch / speed
        step = line["step"]
        times.append(elapsed)
    return times
