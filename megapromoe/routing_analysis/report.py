"""The routing report of a run: one HTML page with embedded pictures, and its numbers as JSON."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapromoe.data.sources import open_dataset
from megapromoe.io import write_bytes, write_json, write_text
from megapromoe.number_text import share_of
from megapromoe.routing_analysis import figures
from megapromoe.routing_analysis.analysis import Request, Section, analyse, check_top_k, choose_subsets
from megapromoe.routing_analysis.observe import chosen_layers, measure_routing
from megapromoe.sampling.run_model import check_has_classes, load_model, run_config
from megapromoe.work_progress import Progress


def write_routing_report(
    run: Path,
    out: Path,
    request: Request,
    step: int | None = None,
    weights: str = "ema",
    pictures: bool = False,
) -> dict[str, Any]:
    """Analyses a run's checkpoint and writes `routing.html` and `routing.json` to the folder `out`.

    Args:
        run: run directory.
        out: folder of the report.
        request: settings of the analysis.
        step, weights: see `load_model`.
        pictures: also write each figure as a PNG file.

    Returns:
        The content of the JSON file.

    Raises RoutingError, ClassGroupError, or what `load_model` and `open_dataset` raise, before anything is written.
    """
    check_has_classes(run, run_config(run))
    model, config, step = load_model(run, step, weights, "cuda" if torch.cuda.is_available() else "cpu")
    chosen_layers(config, request.layers, request.levels)
    check_top_k(config, request.top_k)
    dataset = open_dataset(config)
    subsets = choose_subsets(config, dataset, request.subsets)
    passes = len(request.levels) * min(request.images, len(dataset))
    with Progress(passes, "image", "routing") as progress:
        routing = measure_routing(
            model, config, dataset, request.images, request.levels, request.layers, request.tokens, progress.update
        )
    facts = {"run": run.name, "step": step, "weights": weights, "router": config.model.router}
    numbers, sections = analyse(model, config, dataset, routing, subsets, request)
    numbers = facts | numbers
    shots = {section.name: figures.png(section.figure) for section in sections}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "routing.json", plain(numbers), indent=1)
    write_text(out / "routing.html", page(numbers, sections, shots))
    if pictures:
        for name, shot in shots.items():
            write_bytes(out / f"{name}.png", shot)
    return numbers


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
        f"<p>Router {numbers['router']}, {numbers['weights']} weights, {numbers['images']} labelled training"
        f" images, {len(numbers['levels'])} noise levels. All numbers are also in <code>routing.json</code>.</p>",
        _table(numbers),
    ]
    for section in sections:
        picture = base64.b64encode(shots[section.name]).decode()
        body.append(f'<h2 id="{section.name}">{html.escape(section.title)}</h2>')
        body += [f"<p><b>{html.escape(name)}:</b> {html.escape(text)}</p>" for name, text in section.definitions]
        body += [f"<p>{html.escape(note)}</p>" for note in section.notes]
        body.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{picture}">')
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


def _table(numbers: Mapping[str, Any]) -> str:
    header, rows = layer_table(numbers)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
