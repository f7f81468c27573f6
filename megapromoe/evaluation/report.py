"""A report of a run with measured values: report.json and report.md in the run directory.

The quality of generated digits is measured by an independent classifier, a support vector machine fitted to
scikit-learn's digits: the accuracy is the share of generated digits that it classifies as the requested class.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.options import Config
from megapromoe.data.datasets import Digits
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.image_grid import generate, grid, picture_scale, write_png
from megapromoe.errors import UserError
from megapromoe.evaluation.loss_plot import draw_losses
from megapromoe.io import write_json, write_text
from megapromoe.nn.dit import DiT
from megapromoe.number_text import clock_text, share_of, significant
from megapromoe.planning.cost import parameters
from megapromoe.routing_analysis.figures import routing_picture
from megapromoe.run_lines import DENOISING_LOSS, LOSSES, TOTAL_LOSS, elapsed_seconds, is_auxiliary_loss, metrics_of
from megapromoe.sampling.run_model import check_has_classes, load_model, run_config
from megapromoe.versions import versions

FINAL_STEPS = 100  # the final loss is the mean of the lines that were logged in the last steps
GRID_SIZE = 10  # number of classes in samples.png, and largest number of images of each


class ReportError(UserError):
    """A run for which no report can be written."""


def digit_features(images_BCHW: np.ndarray) -> np.ndarray:
    """Digits (B, 1, 8, 8) in [-1, 1] as features (B, 64) in [0, 16], the range of scikit-learn's digits."""
    images = np.asarray(images_BCHW, dtype=np.float64)
    return ((images.clip(-1, 1) + 1) * 8).reshape(len(images), -1)


def _digit_classifier():
    from sklearn.svm import SVC  # slow to import

    return SVC(C=10, gamma=0.001)  # gamma of scikit-learn's example of digit recognition


def classifier_accuracy(images_BCHW: np.ndarray, labels_B: np.ndarray) -> float:
    """Share of digits (B, 1, 8, 8) that a classifier, fitted to all real digits, assigns to their labels (B,)."""
    real = Digits()
    classifier = _digit_classifier().fit(digit_features(real.images), real.labels)
    return float((classifier.predict(digit_features(images_BCHW)) == np.asarray(labels_B)).mean())


def classifier_own_accuracy() -> float:
    """The accuracy of that classifier on real digits, by 5-fold cross-validation."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    real = Digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    features = digit_features(real.images)
    return float(cross_val_score(_digit_classifier(), features, real.labels, cv=folds).mean())


def training_figures(lines: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Final losses, speed and time from the lines of metrics.jsonl, as `run_lines.metrics_of` reads them.

    Returns:
        `steps`; `final_loss`, the denoising loss, and `final_losses`, it, each auxiliary loss and the total, means over
        the last 100 steps; `images_per_second`, the median; `training_seconds`, images over the speed of their time,
        hence without start-up and saving; `elapsed_seconds`, with saving and sampling.

    Raises ReportError without a line.
    """
    if not lines:
        raise ReportError("metrics.jsonl has no lines; train for at least train.log_every steps")
    last = lines[-1]["step"]
    final = [line for line in lines if line["step"] > last - FINAL_STEPS]
    losses = {}
    of_users = dict.fromkeys(name for line in final for name in line if is_auxiliary_loss(name) and name not in LOSSES)
    for name in (*LOSSES, *of_users):
        if values := [line[name] for line in final if line.get(name) is not None]:  # null: it was not finite
            losses[name] = float(np.mean(values))
    steps = np.diff([0, *(line["step"] for line in lines)])
    speeds = np.array([line["images_per_second"] for line in lines])
    return {
        "steps": last,
        "final_loss": losses.get(DENOISING_LOSS),
        "final_losses": losses,
        "images_per_second": float(np.median(speeds)),
        "training_seconds": float((steps * config.train.global_batch / speeds).sum()),
        "elapsed_seconds": elapsed_seconds(lines, config.train.global_batch)[-1],
    }


def machine() -> dict[str, Any]:
    """CPU, cores, GPU and versions of packages of this process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": _cores(), "gpu": gpu, **versions(("megapromoe", "torch", "deepspeed"))}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_report(run: Path, samples: int = 500, timings: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Generates samples with the latest averaged weights, analyses the routing, and writes a report.

    Writes samples.png, loss.png, routing.png (not for a dense model), report.json and report.md into the run directory.

    Args:
        run: the run directory.
        samples: number of images to generate, classes in turn. For digits, their accuracy is measured.
        timings: seconds of earlier work, by name, to include in the report.

    Returns:
        the content of report.json.

    Raises ReportError; also what `load_model` raises.
    """
    directory = RunDirectory(run)
    check_has_classes(run, run_config(run))
    model, config, step = load_model(run, device="cuda" if torch.cuda.is_available() else "cpu")
    lines = logged_lines(directory)
    dataset = open_dataset(config)
    report = facts_of_run(directory, config, step, lines, timings or {})
    seconds = report["seconds"]
    start = time.perf_counter()
    report["sampling"], images, labels = _sampled(model, config, samples)
    seconds["sampling"] = time.perf_counter() - start
    if draw_losses(lines, config, directory.folder / "loss.png"):
        report["loss_picture"] = "loss.png"
    if config.model.in_channels in (1, 3):
        report["picture"] = "samples.png"
        write_png(directory.folder / report["picture"], _picture(images, labels))
    if config.data.source == "digits":
        report["accuracy"] = classifier_accuracy(images, labels)
        report["classifier_own_accuracy"] = classifier_own_accuracy()
    if config.model.moe_blocks:
        start = time.perf_counter()
        report["routing"] = routing_picture(model, config, dataset, directory.folder / "routing.png")
        seconds["routing"] = time.perf_counter() - start
    write_json(directory.folder / "report.json", report, indent=2)
    write_text(directory.folder / "report.md", markdown(report))
    return report


def logged_lines(directory: RunDirectory) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run. Raises ReportError if the file is missing."""
    if not directory.metrics.is_file():
        raise ReportError(f"{directory.metrics}: is missing; the folder is not a run, or a part of it was moved")
    return metrics_of(directory.metrics)


def facts_of_run(
    directory: RunDirectory, config: Config, step: int, lines: list[dict[str, Any]], timings: Mapping[str, float]
) -> dict[str, Any]:
    """What a report says of every run: its training, layout, size and machine.

    Args:
        step: of the checkpoint that is reported on.
        lines: of metrics.jsonl.
        timings: seconds of earlier work, by name.
    """
    count = parameters(config.model)
    return {
        "run": directory.folder.name,
        "checkpoint_step": step,
        **training_figures(lines, config),
        "layout": _layout(directory),
        "deepspeed": config.train.deepspeed,
        "parameters": {"total": count.total, "trainable": count.trainable, "active": count.active},
        "machine": machine(),
        "seconds": dict(timings),
    }


def _sampled(model: DiT, config: Config, count: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The sampling settings, `count` generated images (N, C, H, W), and their labels (N,), classes in turn."""
    labels = [i % config.model.num_classes for i in range(count)]
    images = generate(model, config, labels, range(count)).cpu().numpy()
    s = config.sample
    settings = {"images": count, "method": s.method, "steps": s.steps, "guidance": s.guidance, "seed": s.seed}
    return settings, images, np.array(labels)


def _picture(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A grid with a row for each of the first classes, all with the same number of images."""
    rows = [np.flatnonzero(labels == c) for c in np.unique(labels)[:GRID_SIZE]]
    columns = min(GRID_SIZE, *map(len, rows), len(images))
    chosen = np.concatenate([row[:columns] for row in rows])
    return grid(images[chosen], columns, picture_scale(images.shape[-1]))


def _layout(directory: RunDirectory) -> dict[str, Any] | None:
    """The parallel layout of the latest start of the run; None if it is not recorded."""
    if not directory.environment.is_file():
        return None
    return json.loads(directory.environment.read_text(encoding="utf-8"))[-1]["layout"]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown; values that were not measured are left out."""
    how, rows = report["sampling"], rows_of_training(report)
    if "accuracy" in report:
        read = f"**{report['accuracy']:.1%}** of {how['images']}"
        rows.append(("sampled digits that a classifier assigns to their class", read))
        real_accuracy = f"{report['classifier_own_accuracy']:.1%}"
        rows.append(("that classifier on real digits, cross-validated", real_accuracy))
    sampler = f"{how['method']}, {how['steps']} steps, guidance {how['guidance']}, seed {how['seed']}"
    rows += [("sampler", sampler), row_of_machine(report)]
    page = page_of_rows(report, rows)
    if "loss_picture" in report:
        page += ["", "## Training", "", f"![denoising loss over steps and over hours]({report['loss_picture']})"]
    if "picture" in report:
        page += ["", "## Samples", "", f"![a row of samples for each class]({report['picture']})"]
    if routing := report.get("routing"):
        page += ["", "## Experts", "", "![routing of the experts](routing.png)", ""]
        page += ["| block | largest load over mean | load entropy, 1: even | dead experts | bits about the class |"]
        page += ["|---|---|---|---|---|"]
        names = ("blocks", "load_max_over_mean", "load_entropy", "dead_experts", "class_information_bits")
        for block, ratio, entropy, dead, bits in zip(*(routing[name] for name in names), strict=True):
            page.append(
                f"| {block} | {ratio:.2f} | {entropy:.3f} | {share_of(dead, routing['experts'])} | {bits:.2f} |"
            )
    return "\n".join(page) + "\n"


def rows_of_training(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what `facts_of_run` says, without the machine."""
    size = report["parameters"]
    rows = [("steps", f"{report['steps']:,} (sampled at {report['checkpoint_step']:,})")]
    if losses := report["final_losses"]:
        if len(losses) == 2 and {DENOISING_LOSS, TOTAL_LOSS} <= losses.keys():
            losses = {DENOISING_LOSS: losses[DENOISING_LOSS]}  # the total loss is the same
        words = [name.replace("_", " ") for name in losses]
        heading = f"{', '.join(words)}, mean{'s' * (len(words) > 1)} of the last {FINAL_STEPS} steps"
        rows.append((heading, ", ".join(f"{loss:.4f}" for loss in losses.values())))
    rows += [
        ("training speed, median", f"{significant(report['images_per_second'])} images/s"),
        ("training time, without start-up and saving", f"{report['training_seconds']:.0f} s"),
        ("training time of all starts, with saving", clock_text(report["elapsed_seconds"])),
        *((f"time of {name}", f"{seconds:.0f} s") for name, seconds in report["seconds"].items()),
        ("parameters", f"{size['total']:,}, {size['active']:,} active per token, {size['trainable']:,} trained"),
    ]
    if layout := report["layout"]:
        spread = f"tensor {layout['tp']}, expert {layout['ep']}, data {layout['dp']}"
        rows.append(("ranks", f"{layout['world']}: {spread}; {report['deepspeed']}"))
    return rows


def row_of_machine(report: Mapping[str, Any]) -> tuple[str, str]:
    """The machine and the versions."""
    host = report["machine"]
    device = host["gpu"] or f"{host['cpu']}, {host['cores']} cores"
    return "machine", f"{device}; torch {host['torch']}, deepspeed {host['deepspeed']}"


def page_of_rows(report: Mapping[str, Any], rows: list[tuple[str, str]]) -> list[str]:
    """The first lines of a report as Markdown: its title and a table."""
    page = [f"# Report of {report['run']}", "", "| | |", "|---|---|"]
    return page + [f"| {name} | {value} |" for name, value in rows]
