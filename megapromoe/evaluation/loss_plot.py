"""A plot of the denoising loss of a run over steps and over training time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megapromoe.config.options import Config
from megapromoe.io import atomic_write
from megapromoe.run_lines import DENOISING_LOSS, elapsed_seconds

HOUR, MINUTE = 3600.0, 60.0


def loss_curve(lines: Sequence[Mapping[str, Any]], config: Config) -> tuple[list[int], list[float], list[float]]:
    """Steps, training time in seconds and denoising loss of the lines that have a denoising loss.

    Args:
        lines: lines of metrics.jsonl, as `run_lines.metrics_of` reads them.
    """
    times = elapsed_seconds(lines, config.train.global_batch)
    points = [
        (line["step"], seconds, line[DENOISING_LOSS])
        for line, seconds in zip(lines, times, strict=True)
        if line.get(DENOISING_LOSS) is not None
    ]
    return [point[0] for point in points], [point[1] for point in points], [point[2] for point in points]


def draw_losses(lines: Sequence[Mapping[str, Any]], config: Config, file: Path) -> bool:
    """Plots the denoising loss over steps and over time as a PNG. Returns False if fewer than two lines have one.

    Raises OSError if `file` cannot be written.
    """
    steps, seconds, losses = loss_curve(lines, config)
    if len(steps) < 2:
        return False
    unit, name = (HOUR, "hours") if seconds[-1] >= HOUR else (MINUTE, "minutes")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # not by pyplot, which keeps all figures
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(steps, losses, color="black", linewidth=1.2)
    left.set(xlabel="step", ylabel="denoising loss")
    right.plot([time / unit for time in seconds], losses, color="black", linewidth=1.2)
    right.set(xlabel=f"{name} of training, over all starts")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_write(file) as picture:
        figure.savefig(picture, format="png", dpi=120)
    return True
