"""The JSON-lines files of a run (metrics.jsonl and evaluation.jsonl), and the names of its losses.

`denoising_loss` is the loss of the diffusion objective. All models have it, so it is used to compare them. `total_loss`
is the loss that is differentiated: the denoising loss plus the auxiliary losses. Each auxiliary loss is logged under a
name of its own and includes its weight.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DENOISING_LOSS, TOTAL_LOSS = "denoising_loss", "total_loss"
# Auxiliary losses: name in the router -> name in metrics.jsonl.
AUXILIARY_LOSSES = {
    "rcl": "contrastive_loss",
    "balance": "balance_loss",
    "classification": "classification_loss",
    "capacity": "capacity_loss",
    "alignment": "alignment_loss",
    "mixture": "mixture_loss",
    "similarity": "similarity_loss",
}
# Losses of users' routers are logged as "NAME_loss".
LOSSES = (DENOISING_LOSS, *AUXILIARY_LOSSES.values(), TOTAL_LOSS)
# Names in metrics.jsonl before version 0.1; `loss` was the total.
_FORMER_NAMES = {"loss": TOTAL_LOSS, "denoising": DENOISING_LOSS, **AUXILIARY_LOSSES}


def logged_loss(name: str) -> str:
    """The name in metrics.jsonl of an auxiliary loss, which a user's router may have added.

    Raises ValueError for a name that would be logged as another loss.
    """
    logged = AUXILIARY_LOSSES.get(name, f"{name}_loss")
    if logged in (DENOISING_LOSS, TOTAL_LOSS) or (name not in AUXILIARY_LOSSES and logged in LOSSES):
        raise ValueError(f"a router has a loss {name!r}, which would be logged as {logged!r}: give it another name")
    return logged


def is_auxiliary_loss(logged: str) -> bool:
    """Whether a key of metrics.jsonl is an auxiliary loss."""
    return logged.endswith("_loss") and logged not in (DENOISING_LOSS, TOTAL_LOSS)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Lines that are not valid, such as one that a kill cut off, are skipped.

    Returns an empty list if `path` does not exist or is no regular file. Raises OSError if it cannot be read.
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
    """The lines of a metrics.jsonl in order, with current names, whichever version wrote them."""
    return [current_names(line) for line in lines_of(path)]


def former_lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with current names, if an earlier version wrote all of them; else an empty list."""
    lines = lines_of(path)
    return [current_names(line) for line in lines] if all("loss" in line for line in lines) else []


def current_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with current names. A resumed run can have lines with former and with current names."""
    return {_FORMER_NAMES.get(name, name): value for name, value in line.items()}


def elapsed_seconds(lines: Iterable[Mapping[str, Any]], global_batch: int) -> list[float]:
    """Seconds of training up to each line, over all starts of the run, ascending.

    Lines of earlier versions have no `elapsed_seconds`. For these it is estimated from the number of images and the
    speed, which excludes start-up, saving and sampling.

    Args:
        lines: lines of metrics.jsonl in order.
        global_batch: images of a step.
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
