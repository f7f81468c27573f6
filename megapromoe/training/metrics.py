"""Reports of a run in training: metrics.jsonl, TensorBoard, Weights & Biases, sample pictures, progress."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import summary
from tqdm import tqdm

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.config.options import Config
from megapromoe.config.resolve import to_yaml
from megapromoe.imports import uncollected
from megapromoe.io import is_own_file, write_text
from megapromoe.number_text import clock_text, share_of, significant
from megapromoe.planning.placement_search import fullest_over_mean
from megapromoe.run_lines import (
    AUXILIARY_LOSSES,
    DENOISING_LOSS,
    LOSSES,
    TOTAL_LOSS,
    former_lines_of,
    is_auxiliary_loss,
)
from megapromoe.training.log_files import AppendedFile, LogFolder, PictureFolder
from megapromoe.training.run_clock import RunClock
from megapromoe.training.tensorboard_events import EventFile
from megapromoe.training.wandb_run import WandbRun

logger = logging.getLogger(__name__)

HEAT_MAPS = 20  # at most, per run: drawing one takes as long as some steps of a small model
FIRST_HEAT_MAP = 5.0  # seconds after the start: the first steps are reported without waiting for matplotlib
DRAWING_SHARE = 0.02  # of the time between two heat maps, at most; the import of matplotlib does not count

# Values in the progress bar and the log lines: key, label, format. The total loss is shown if it has auxiliary parts.
SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    (DENOISING_LOSS, "denoising loss", "{:.4f}".format),
    *((name, name.removesuffix("_loss"), "{:.4g}".format) for name in AUXILIARY_LOSSES.values()),
    (TOTAL_LOSS, "total", "{:.4g}".format),
    ("gradient_norm", "grad", "{:.3g}".format),
    ("images_per_second", "img/s", significant),
    ("mfu", "mfu", "{:.1%}".format),
)


class Metrics:
    """Writes the metrics of a run if `enabled`. Records that cannot be written are kept in memory: see `log_files`.

    Each line of metrics.jsonl has `wall_time`, seconds since 1970 as in TensorBoard's events, and `elapsed_seconds`,
    the training time of the run over all starts, which does not decrease from line to line.

    Args:
        folder: the run directory, for metrics.jsonl, tensorboard/ and samples/.
        total_steps: optimizer steps of the complete run.
        first_step: steps completed before. Logged values of later steps are dropped, since these steps are repeated.
        enabled: true on exactly one rank.
        terminal: True shows a progress bar, False log lines; None: a bar if stderr is a terminal.
        clock: clock of the run; None: a new one that starts now.

    Attributes:
        last: values of the last logged step; None before that, and unless `enabled`.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        total_steps: int,
        first_step: int = 0,
        enabled: bool = True,
        terminal: bool | None = None,
        clock: RunClock | None = None,
    ):
        self.enabled, self.total_steps = enabled, total_steps
        self.clock = clock or RunClock(0.0, first_step, total_steps)
        self.last: Mapping[str, float | None] | None = None
        self._closed = False
        if not enabled:
            return
        self._blocks = config.model.moe_blocks
        self._experts = len(self._blocks) * config.model.num_experts
        self._heat_map_every = max(1, total_steps // HEAT_MAPS)
        self._next_heat_map = first_step
        self._no_heat_map_before = time.monotonic() + FIRST_HEAT_MAP
        path = Path(folder) / "metrics.jsonl"
        self._folder = log_folder = LogFolder(folder)
        self._lines = AppendedFile(path, log_folder, prepare=lambda: rewind(path, first_step))
        self._lines.flush()
        self._board = EventFile(log_folder, first_step + 1)
        self._board.add(first_step, summary.text("config", f"```yaml\n{to_yaml(config)}```"))
        self._continue_former_curves(path)
        self._wandb = WandbRun(log_folder.path, config) if config.train.wandb else None
        self._pictures = PictureFolder(log_folder.path / "samples", log_folder)
        self._bar = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def log(self, step: int, values: Mapping[str, float | None], layers: Mapping[str, Any] | None = None) -> None:
        """Reports an optimizer step.

        Args:
            step: number of completed steps, from 1.
            values: name -> number, None if there is no value. None and numbers that are not finite are null in
                metrics.jsonl, because JSON cannot represent them.
            layers: name -> array (M,) or (M, E), for M MoE layers and E experts. TensorBoard shows the first as
                scalars, the second as a heat map at most `HEAT_MAPS` times per run, from `FIRST_HEAT_MAP` on, and
                within `DRAWING_SHARE`.
        """
        if not self.enabled:
            return
        self.last = values
        arrays = {name: torch.as_tensor(a).detach().double().cpu().numpy() for name, a in (layers or {}).items()}
        # Seven digits represent a float32.
        line: dict[str, Any] = {"step": step, "wall_time": round(time.time(), 3)}
        line["elapsed_seconds"] = round(self.clock.elapsed, 3)
        line |= {n: None if value is None else _json(float(value)) for n, value in values.items()}
        line |= {name: [_json(row) for row in array] for name, array in arrays.items()}
        self._lines.write((json.dumps(line, allow_nan=False) + "\n").encode())
        shown = [summary.scalar(name, float(value)) for name, value in values.items() if value is not None]
        curves, pictures = dict(values), {}
        drawn = [name for name, array in arrays.items() if array.ndim == 2 and array.size]
        if drawn and step >= self._next_heat_map and time.monotonic() >= self._no_heat_map_before:
            self._next_heat_map = step + self._heat_map_every
            _import_matplotlib()
            start = time.monotonic()
            for name in drawn:
                picture = heat_map(arrays[name], f"{name}, step {step}", self._blocks)
                shown.append(summary.image(name, picture, dataformats="HWC"))
                pictures[name] = picture
            self._no_heat_map_before = (end := time.monotonic()) + (end - start) / DRAWING_SHARE
        for name, array in arrays.items():
            if array.ndim == 1:
                of_blocks = zip(self._blocks, array.tolist(), strict=True)
                curves |= (blocks := {f"{name}/block {block}": value for block, value in of_blocks})
                shown += [summary.scalar(label, value) for label, value in blocks.items()]
        self._board.add(step, *shown)
        if self._wandb is not None:
            self._wandb.log(step, curves, pictures)
        self._show(step, values)

    def _continue_former_curves(self, path: Path) -> None:
        """Adds losses that an earlier version logged to TensorBoard under their current names, once."""
        try:
            lines = former_lines_of(path)
        except OSError:  # `self._lines` has logged it
            return
        for line in lines:
            losses = {name: line[name] for name in LOSSES if line.get(name) is not None}
            self._board.add(line["step"], *(summary.scalar(name, value) for name, value in losses.items()))

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Adds a picture to TensorBoard: (height, width) or (height, width, 3), uint8, or float in [0, 1]."""
        if self.enabled:
            self._board.add(step, summary.image(name, array, dataformats="HW" if array.ndim == 2 else "HWC"))

    def samples(self, step: int, picture: np.ndarray) -> None:
        """Writes a picture of samples, uint8 (height, width, 3), as a PNG file and to TensorBoard."""
        if self.enabled:
            self._pictures.write((f"step-{step:08d}.png", picture))
            self.image(step, "samples", picture)
            if self._wandb is not None:
                self._wandb.log(step, {}, {"samples": picture})

    def finish_bar(self) -> None:
        """Closes the progress bar, so that log lines are printed below it."""
        if self.enabled and self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        """Closes the logs and the progress bar. Can be called twice."""
        if not self.enabled or self._closed:
            return
        self._closed = True
        for log in (self._lines, self._board, self._pictures):
            log.close()
        if self._wandb is not None:
            self._wandb.close()
        self._folder.close()
        self.finish_bar()

    def _show(self, step: int, values: Mapping[str, float | None]) -> None:
        numbers = {key: value for key, value in values.items() if value is not None}
        auxiliary = [key for key in numbers if is_auxiliary_loss(key)]
        if not auxiliary:
            numbers.pop(TOTAL_LOSS, None)
        shown = {name: text(numbers[key]) for key, name, text in SHOWN if key in numbers}
        of_users = [key for key in auxiliary if key not in LOSSES]
        shown |= {key.removesuffix("_loss"): f"{numbers[key]:.4g}" for key in of_users}
        if "dead_experts" in numbers:
            shown["dead experts"] = share_of(numbers["dead_experts"], self._experts)
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            times = f"{clock_text(self.clock.elapsed)} ({clock_text(self.clock.left(step))} left)"
            values_in_words = "  ".join(f"{n} {v}" for n, v in shown.items())
            logger.info("step %d/%d  %s  %s", step, self.total_steps, times, values_in_words)


def _step_of(line: str) -> int:
    return json.loads(line)["step"]


def rewind(path: Path, step: int, step_of: Callable[[str], int] = _step_of) -> None:
    """Removes the lines of steps after `step` and, with a warning, unreadable lines from a metrics.jsonl.

    The file is replaced atomically, only if its content changes or it is a link. A link is replaced by a regular file,
    and its target is not changed. Raises OSError.

    Args:
        step_of: the step of a line of another file; raises ValueError, TypeError or KeyError if it is unreadable.
    """
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file; move it away", str(path))
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept, damaged = [], 0
    for line in before.splitlines():
        try:
            if step_of(line) <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        logger.warning("%s: dropped %d unreadable lines; a run may have been killed while it wrote", path, damaged)
    after = "".join(kept)
    is_own = is_own_file(path)
    if after != before or not is_own:
        write_text(path, after)
    if not is_own:
        logger.warning(
            "%s: was a link; it was replaced by a regular file, and the target of the link was not changed", path
        )


def _import_matplotlib() -> None:
    """Imports what `heat_map` draws with: slow, and only one rank draws."""
    with uncollected(exempt=False):
        import matplotlib.backends.backend_agg  # noqa: F401


def heat_map(table: np.ndarray, title: str, rows: tuple[int, ...]) -> np.ndarray:
    """Draws a table (layers, experts) as a heat map, each row normalised by its sum.

    Args:
        table: numbers, such as routed rows per expert.
        title: title of the picture.
        rows: block number of each row.

    Returns:
        uint8 (height, width, 3).
    """
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    layers, experts = table.shape
    width, height = min(3 + 0.3 * experts, 14), min(1.5 + 0.3 * layers, 10)  # inches
    figure = Figure(figsize=(width, height))
    canvas = FigureCanvasAgg(figure)  # not by pyplot, which keeps all figures that it creates
    figure.subplots_adjust(bottom=0.55 / height, top=1 - 0.35 / height)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, vmin=0, vmax=max(2 / experts, shares.max()), aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="expert", ylabel="block", yticks=range(layers), yticklabels=rows)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    figure.colorbar(picture, label="share of the rows")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def expert_statistics(load_LE: Tensor) -> dict[str, float]:
    """Load balance of the experts, over all ranks.

    Args:
        load_LE: routed rows for each MoE layer and expert; empty for a dense model, for which nothing is returned.

    Returns:
        `dead_experts`: number of experts without a row, over all layers. Over the layers that routed any row (a batch
        of null-class images routes none): `load_max_over_mean`, the largest load of an expert over the mean load of its
        layer, for the worst layer (1 is balanced); `load_entropy`, the mean over layers of the entropy of the load
        shares divided by log(E), in [0, 1] (1 is balanced).
    """
    if load_LE.numel() == 0:
        return {}
    load_LE = load_LE.double()
    statistics = {"dead_experts": float((load_LE == 0).sum())}
    busy_LE = load_LE[load_LE.sum(dim=1) > 0]
    if len(busy_LE):
        share_LE = busy_LE / busy_LE.sum(dim=1, keepdim=True)
        experts = share_LE.shape[1]
        entropy_L = torch.special.entr(share_LE).sum(dim=1)
        statistics["load_max_over_mean"] = float(share_LE.max()) * experts
        statistics["load_entropy"] = float(entropy_L.mean()) / math.log(experts) if experts > 1 else 1.0
    return statistics


def rank_statistics(load_LE: Tensor, placements: Sequence[ExpertPlacement]) -> dict[str, float]:
    """Load balance of the ranks of an expert-parallel group.

    Args:
        load_LE: as for `expert_statistics`, over all ranks and so over all groups.
        placements: of each layer.

    Returns:
        `rank_load_max_over_mean`, the rows of the fullest rank of each layer over the mean of all ranks, both summed
        over layers (1 is balanced); nothing without expert parallelism or without rows.
    """
    if not placements or placements[0].ep == 1 or not load_LE.any():
        return {}
    return {"rank_load_max_over_mean": fullest_over_mean(load_LE.double().numpy()[None], placements)}


def throughput(
    images: int, seconds: float, flops_per_image: float, world: int, peak_flops: float | None
) -> dict[str, float]:
    """Speed of the complete job.

    Args:
        images: images of all ranks that were trained on in `seconds`.
        seconds: duration.
        flops_per_image: useful floating-point operations per image, `cost.flops_per_image(model).training`.
        world: number of ranks.
        peak_flops: peak FLOP/s of the device of a rank; None if unknown.

    Returns:
        `images_per_second`, `flops_per_second` and, if the peak is known, `mfu`: the fraction of the peak of all ranks.
    """
    rate = images / seconds
    speed = {"images_per_second": rate, "flops_per_second": rate * flops_per_image}
    if peak_flops is not None:
        speed["mfu"] = rate * flops_per_image / (world * peak_flops)
    return speed


def memory() -> int:
    """Peak memory of this process in bytes: allocated on its GPU, or resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # kilobytes on Linux


def _json(value: Any) -> Any:
    """A float or an array for JSON: integers without a point, others with 7 digits, null if not finite."""
    if isinstance(value, np.ndarray):
        return [_json(v) for v in value]
    if not math.isfinite(value):
        return None
    return int(value) if abs(value) < 2**53 and value == int(value) else float(f"{value:.7g}")
