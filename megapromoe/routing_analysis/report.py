"""The routing report of a run: one HTML page with embedded pictures, and its numbers as JSON."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapromoe.config.options import Config
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.io import write_bytes, write_json, write_text
from megapromoe.number_text import share_of
from megapromoe.routing_analysis import figures
from megapromoe.routing_analysis.analysis import Request, analyse, check_top_k, choose_subsets
from megapromoe.routing_analysis.captioned_images import CaptionedImages, images_of_data
from megapromoe.routing_analysis.observe import RoutingError, chosen_layers, measure_routing
from megapromoe.routing_analysis.sections import Section
from megapromoe.routing_analysis.text_analysis import analyse_texts
from megapromoe.routing_analysis.text_routing import measure_text_routing
from megapromoe.sampling.run_model import load_model, run_config
from megapromoe.work_progress import Progress

TaskImages = Callable[[Config, str, int], CaptionedImages]
"""Makes images of the prompts of tasks: from the config of a run, the device of the encoder, and about how many."""


def write_routing_report(
    run: Path,
    out: Path,
    request: Request,
    step: int | None = None,
    weights: str = "ema",
    pictures: bool = False,
    tasks: TaskImages | None = None,
) -> dict[str, Any]:
    """Analyses a run's checkpoint and writes `routing.html` and `routing.json` to the folder `out`.

    Args:
        run: run directory.
        out: folder of the report.
        request: settings of the analysis.
        step, weights: see `load_model`.
        pictures: also write each figure as a PNG file.
        tasks: makes images of the prompts of tasks, of about the given number; for models of texts trained on scenes.

    Returns:
        The content of the JSON file.

    Raises RoutingError, ClassGroupError, or what `load_model` and `open_dataset` raise, before anything is written.
    """
    config, device = run_config(run), "cuda" if torch.cuda.is_available() else "cpu"
    chosen_layers(config, request.layers, request.levels)
    check_top_k(config, request.top_k)
    analysed = _texts if config.model.has_text else _classes
    numbers, sections, step = analysed(run, config, request, step, weights, device, tasks)
    facts = {"run": run.name, "step": step, "weights": weights, "router": config.model.router}
    numbers = facts | numbers
    shots = {section.name: figures.png(section.figure) for section in sections}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "routing.json", plain(numbers), indent=1)
    write_text(out / "routing.html", page(numbers, sections, shots))
    if pictures:
        for name, shot in shots.items():
            write_bytes(out / f"{name}.png", shot)
    return numbers


Analysed = tuple[dict[str, Any], list[Section], int]


def _classes(
    run: Path, config: Config, request: Request, step: int | None, weights: str, device: str, tasks: TaskImages | None
) -> Analysed:
    """Numbers, sections and step of a model of classes."""
    dataset = open_dataset(config)
    subsets = choose_subsets(config, dataset, request.subsets)
    model, config, step = load_model(run, step, weights, device)
    with Progress(len(request.levels) * min(request.images, len(dataset)), "image", "routing") as progress:
        routing = measure_routing(
            model, config, dataset, request.images, request.levels, request.layers, request.tokens, progress.update
        )
    return *analyse(model, config, dataset, routing, subsets, request), step


def _texts(
    run: Path, config: Config, request: Request, step: int | None, weights: str, device: str, tasks: TaskImages | None
) -> Analysed:
    """Numbers, sections and step of a model of texts."""
    if request.subsets is not None:
        raise RoutingError(f"{request.subsets}: groups classes, and {run} is a model of texts; leave out the subsets")
    dataset = open_dataset(config)
    images = images_of_data(config, dataset, open_captions(config, dataset), request.images)
    # Before the model is loaded: a GPU never holds it and a text encoder.
    of_tasks = tasks(config, device, request.images) if tasks is not None and images.groups else None
    model, config, step = load_model(run, step, weights, device)
    measured = []
    for some in (images, of_tasks):
        if some is not None:
            with Progress(len(request.levels) * len(some.captions), "image", "routing") as progress:
                levels, layers = request.levels, request.layers
                measured.append(measure_text_routing(model, config, some, levels, layers, progress.update))
    return *analyse_texts(model, config, measured[0], measured[1] if of_tasks else None, request.top_k), step


def plain(value: Any) -> Any:
    """Converts a value for JSON: arrays to lists, floats to 5 digits, values that are not finite to null."""
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def page(numbers: Mapping[str, Any], sections: Sequence[Section], shots: Mapping[str, bytes]) -> str:
    """The HTML page."""
    title = f"Routing of {numbers['run']}, step {numbers['step']}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Router {numbers['router']}, {numbers['weights']} weights, {numbers['images']}"
        f" {'captioned' if 'words' in numbers else 'labelled'} training images, {len(numbers['levels'])} noise levels."
        " All numbers are also in <code>routing.json</code>.</p>",
        _table(*layer_table(numbers)),
    ]
    for section in sections:
        picture = base64.b64encode(shots[section.name]).decode()
        body.append(f'<h2 id="{section.name}">{html.escape(section.title)}</h2>')
        body += [f"<p><b>{html.escape(name)}:</b> {html.escape(text)}</p>" for name, text in section.definitions]
        body += [f"<p>{html.escape(note)}</p>" for note in section.notes]
        body.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{picture}">')
        body += [_table(*table) for table in section.tables]
    style = (
        "body{font:15px/1.45 sans-serif;max-width:1150px;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 9px;text-align:right;border-bottom:1px solid"
        " #ddd}h2{margin-top:2em}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


COLUMNS = {
    "evenness": ("load_entropy",),
    "largest / mean load": ("load_max_over_mean",),
    "experts without rows": ("dead_experts",),
    "class information, bits": ("class_information_bits",),
    "divergence of subsets, bits": ("subset_jensen_shannon_mean",),
    "divergence of words, bits": ("word_divergence_bits",),
    "digit information, bits": ("digit_information_bits",),
    "colour information, bits": ("colour_information_bits",),
    "task information, bits": ("task_information_bits",),
    "router cosine": ("router_cosine_mean",),
    "overlap, input": ("overlap_mean", "input"),
    "overlap, output": ("overlap_mean", "output"),
    "inter/intra by expert": ("distance_ratio", "by expert"),
    "by class": ("distance_ratio", "by class"),
    "super-class accuracy": ("superclass_accuracy",),
}


def layer_table(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row for each layer: the header, and the cells as text."""
    columns = {}
    for title, (key, *inside) in COLUMNS.items():
        if key in numbers:
            columns[title] = numbers[key][inside[0]] if inside else numbers[key]
            if key == "dead_experts":
                columns[title] = [share_of(count, numbers["experts"]) for count in numbers[key]]
    rows = [
        [f"block {block}", *(_cell(values[layer]) for values in columns.values())]
        for layer, block in enumerate(numbers["blocks"])
    ]
    return ["", *columns], rows


def _cell(value: float | str) -> str:
    if isinstance(value, (int, np.integer, str)):
        return str(value)
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
