"""The routing report: every measure of what a run's experts learnt, with its definition, as one HTML page and as JSON.

The page needs nothing but itself: pictures are inside. It speaks of labelled images; the tokens of null images, which
the unconditional expert takes, are not routed.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from megapromoe.config.class_groups import read_groups
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.data.sources import open_dataset
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.layer import MoE
from megapromoe.routing_analysis import figures, measures
from megapromoe.routing_analysis.measures import definition
from megapromoe.routing_analysis.observe import LEVELS, Routing, RoutingError, chosen_layers, measure_routing
from megapromoe.sampling.run_model import load_model

EACH_CLASS = 20  # up to so many classes each is a subset of its own
RANDOM_SUBSET = 200  # classes of each of the two subsets else, as in the paper
SCATTERED = 3  # layers that t-SNE shows
ROUTER_VECTORS = ("prototypes", "centroids", "gate")


@dataclass(frozen=True)
class Request:
    """What a report is to look at.

    `images` of the data set; `levels` quantiles of the training's noise; `layers` blocks (None: all with experts);
    `subsets` a file of groups of classes (None: see `choose_subsets`); `tokens` for t-SNE and distances; `top_k` of
    the singular vectors (0: an eighth of the channels).
    """

    images: int = 500
    levels: tuple[float, ...] = LEVELS
    layers: tuple[int, ...] | None = None
    subsets: Path | None = None
    tokens: int = 2000
    top_k: int = 0


@dataclass
class Section:
    """A heading, what is measured, and the picture of it; `says` are (name of a measure, its definition)."""

    name: str
    title: str
    says: list[tuple[str, str]]
    figure: Figure
    notes: list[str] = field(default_factory=list)


def write_routing_report(
    run: Path,
    out: Path,
    request: Request,
    step: int | None = None,
    weights: str = "ema",
    pictures: bool = False,
) -> dict[str, Any]:
    """Analyses a run's checkpoint and writes `routing.html` and `routing.json` into the folder `out`.

    Args:
        step, weights: see `load_model`.
        pictures: also write each picture as a PNG file.

    Returns:
        the content of the JSON file.

    Raises RoutingError, ClassGroupError, or what `load_model` and `open_dataset` raise, before anything is written.
    """
    model, config, step = load_model(run, step, weights, "cuda" if torch.cuda.is_available() else "cpu")
    chosen_layers(config, request.layers, request.levels)
    check_top_k(config, request.top_k)
    dataset = open_dataset(config)
    subsets = choose_subsets(config, dataset, request.subsets)
    passes = len(request.levels) * min(request.images, len(dataset))
    with tqdm(total=passes, desc="routing", unit="image", disable=None) as bar:
        routing = measure_routing(
            model, config, dataset, request.images, request.levels, request.layers, request.tokens, bar.update
        )
    facts = {"run": run.name, "step": step, "weights": weights, "router": config.model.router}
    numbers, sections = analyse(model, config, dataset, routing, subsets, request)
    numbers = facts | numbers
    out.mkdir(parents=True, exist_ok=True)
    shots = {section.name: figures.png(section.figure) for section in sections}
    _write(out / "routing.json", json.dumps(plain(numbers), indent=1, allow_nan=False).encode() + b"\n")
    _write(out / "routing.html", page(numbers, sections, shots).encode())
    if pictures:
        for name, shot in shots.items():
            _write(out / f"{name}.png", shot)
    return numbers


def check_top_k(config: Config, top_k: int) -> None:
    """Raises RoutingError if experts have no `top_k` singular vectors (0: as many as is usual)."""
    most = min(config.model.hidden_size, config.model.expert_width)
    if not 0 <= top_k <= most:
        raise RoutingError(f"top_k = {top_k}: must be in 1..{most}, the channels and hidden units of an expert")


def choose_subsets(config: Config, dataset: Dataset, file: Path | None) -> dict[str, tuple[int, ...]]:
    """The subsets of classes to compare: those of a file; each class; or, of more than 20 classes, two random ones.

    Raises ClassGroupError for a file that cannot be used.
    """
    classes = config.model.num_classes
    if file is not None:
        return read_groups(file, classes)
    if classes <= EACH_CLASS:
        return {str(name): (number,) for number, name in enumerate(dataset.class_names)}
    shuffled = np.random.default_rng(0).permutation(classes)
    size = min(RANDOM_SUBSET, classes // 2)
    return {f"random {i + 1}": tuple(sorted(map(int, shuffled[i * size : (i + 1) * size]))) for i in range(2)}


def analyse(
    model: DiT,
    config: Config,
    dataset: Dataset,
    routing: Routing,
    subsets: Mapping[str, Sequence[int]],
    request: Request,
) -> tuple[dict[str, Any], list[Section]]:
    """All measures, for JSON, and the sections of the page."""
    m, names = config.model, dataset.class_names
    layers = [model.blocks[block].mlp for block in routing.blocks]
    evenness_ML = measures.evenness(routing.load_MLE)
    share_LUE = np.stack([measures.subset_load(rows_CE, subsets) for rows_CE in routing.rows_LCE])
    js_LUU = np.stack([measures.between(measures.jensen_shannon, share_UE) for share_UE in share_LUE])
    kl_LUU = np.stack([measures.between(measures.kullback_leibler, share_UE) for share_UE in share_LUE])
    cosine_LEE = [measures.cosine_matrix(router_vectors(moe)) for moe in layers]
    k = request.top_k or max(1, min(m.hidden_size, m.expert_width) // 8)
    overlaps = expert_overlaps(layers, routing.blocks, k)
    baselines = {"channels": k / m.hidden_size, "hidden units": k / m.expert_width}
    ratios = ratios_of(routing)
    mean_LUU = [measures.off_diagonal_mean(js_UU) for js_UU in js_LUU]
    mean_cosine = [measures.off_diagonal_mean(cosine_EE) for cosine_EE in cosine_LEE]
    mean_overlap = {name: [measures.off_diagonal_mean(o) for o in all_LEE] for name, all_LEE in overlaps.items()}

    numbers = {
        **routing.numbers(),
        "levels": routing.levels,
        "load_by_level": routing.load_MLE,
        "load_entropy_by_level": evenness_ML,
        "experts_of_a_token": routing.visits_LV / routing.visits_LV.sum(1, keepdims=True),
        "subsets": {name: list(classes) for name, classes in subsets.items()},
        "subset_load": share_LUE,
        "subset_jensen_shannon_bits": js_LUU,
        "subset_jensen_shannon_mean": mean_LUU,
        "subset_kullback_leibler_bits": kl_LUU,
        "router_cosine": cosine_LEE,
        "router_cosine_mean": mean_cosine,
        "overlap_top_k": k,
        "overlap": overlaps,
        "overlap_mean": mean_overlap,
        "overlap_of_random_subspaces": baselines,
        "distance_ratio": ratios,
        "definitions": {name: definition(measure) for name, measure in MEASURES.items()},
    }
    if m.router == "classification":
        right_CE = np.eye(m.num_experts, dtype=bool)[list(m.superclass_of)]
        rows_L = routing.rows_LCE.sum((1, 2))
        numbers["superclass_accuracy"] = (routing.rows_LCE * right_CE).sum((1, 2)) / np.maximum(rows_L, 1)

    shown = sorted({int(i) for i in np.linspace(0, len(layers) - 1, min(SCATTERED, len(layers))).round()})
    bar = tqdm(shown, desc="t-SNE", unit="layer", disable=None)
    places = [measures.t_sne(routing.tokens.x_LTD[layer]) for layer in bar]
    side = m.input_size // m.patch_size
    noise = f"noise level {routing.middle:g}, a quantile of the levels of training"
    nobody = routing.visits_LV[:, 0].sum() / routing.visits_LV.sum()
    grey = [f"{nobody:.1%} of the tokens were taken by no expert; they are grey."] if nobody else []
    sections = [
        Section(
            "classes",
            "Experts and classes",
            _said("load", "information"),
            figures.shares_figure(routing, names),
            [f"A row of a heat-map adds up to 1. Over {len(routing.levels)} noise levels."],
        ),
        Section("load", "Load of the experts", _said("load", "evenness"), figures.load_figure(routing)),
        Section(
            "levels",
            "Load over layers and noise levels",
            _said("evenness"),
            figures.levels_figure(routing, evenness_ML),
            ["Noise levels are quantiles of the levels of training: 0.1 is nearly clean, 0.9 nearly noise."],
        ),
        Section(
            "subsets",
            "Subsets of classes",
            _said("subset_load", "jensen_shannon", "kullback_leibler"),
            figures.subsets_figure(routing, list(subsets), share_LUE, js_LUU),
            ["Kullback-Leibler divergences are in the JSON; null there means infinite or undefined."],
        ),
        Section(
            "maps",
            "From tokens to experts",
            [("token map", "Images, and for each token, which is a patch, the expert with the largest weight.")],
            figures.maps_figure(routing, names, side),
            [f"At {noise}.", *grey],
        ),
        Section(
            "tokens",
            "Tokens in the plane",
            _said("t_sne"),
            figures.scatter_figure(routing, places, shown, names),
            [f"{routing.tokens.x_LTD.shape[1]} tokens as the router meets them, drawn at random, at {noise}.", *grey],
        ),
        Section(
            "distances",
            "Distances of tokens",
            _said("distance_ratio", "clusters"),
            figures.lines_figure(routing, ratios, "inter / intra", {}),
            ["The paper's 0.75 of a dense DiT-XL/2 and 19.3 of a language model are over 10 clusters."],
        ),
        Section(
            "router",
            "Vectors of the router",
            _said("cosine_matrix"),
            figures.matrices_figure(routing, cosine_LEE, "cosine"),
        ),
        Section(
            "diversity",
            "Diversity of the experts",
            _said("subspace_overlap"),
            figures.lines_figure(
                routing,
                mean_overlap,
                f"mean overlap, k = {k}",
                {f"random, {name}": value for name, value in baselines.items()},
            ),
            [
                "Mean over all pairs of experts. Input: the channels an expert listens to, left singular vectors of"
                " its first matrix as x·W (D×F). Output: the channels it writes to, of its second (D×F). Hidden: the"
                " first matrix as stored (F×D); its left vectors live in the hidden units, whose order differs from"
                " expert to expert, so they stay near the random baseline whatever the experts do, unless experts"
                " started as copies."
            ],
        ),
    ]
    return numbers, sections


MEASURES = {
    name: getattr(measures, name)
    for name in (
        *("load", "evenness", "information", "subset_load", "kullback_leibler", "jensen_shannon"),
        *("cosine_matrix", "subspace_overlap", "distance_ratio", "clusters", "t_sne"),
    )
}


def _said(*measures: str) -> list[tuple[str, str]]:
    return [("t-SNE" if name == "t_sne" else name.replace("_", " "), definition(MEASURES[name])) for name in measures]


def router_vectors(moe: MoE) -> np.ndarray:
    """The vectors (E, D) by which a layer's router tells its experts apart."""
    router = moe.router
    found = next((getattr(router, name) for name in ROUTER_VECTORS if hasattr(router, name)), None)
    vectors = router.classifier.weight if found is None else found
    return vectors.detach().float().cpu().numpy()


def expert_overlaps(layers: Sequence[MoE], blocks: Sequence[int], k: int) -> dict[str, list[np.ndarray]]:
    """Overlaps (E, E) of each layer's experts: of what they read, of what they write, and of their hidden units."""
    out: dict[str, list[np.ndarray]] = {"input": [], "output": [], "hidden": []}
    for moe in tqdm(layers, desc="SVD", unit="layer", disable=None):
        first, second = (layer.weight.detach().float().cpu().numpy() for layer in (moe.experts.fc1, moe.experts.fc2))
        for name, weight in (("input", first.swapaxes(1, 2)), ("output", second), ("hidden", first)):
            out[name].append(measures.subspace_overlap(weight, k))
    return out


def ratios_of(routing: Routing) -> dict[str, list[float]]:
    """The distance ratio of each layer's tokens, grouped in three ways."""
    tokens = routing.tokens
    pairs = list(zip(tokens.x_LTD, tokens.expert_LT, strict=True))
    return {
        "by class": [measures.distance_ratio(x_TD, tokens.class_T) for x_TD, _ in pairs],
        "by expert": [measures.distance_ratio(x_TD, expert_T) for x_TD, expert_T in pairs],
        "by k-means cluster": [measures.distance_ratio(x_TD, measures.clusters(x_TD)) for x_TD, _ in pairs],
    }


# ---- writing


def plain(value: Any) -> Any:
    """For JSON: arrays as lists, floats rounded to 5 digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
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
        body += [f"<p><b>{html.escape(name)}:</b> {html.escape(text)}</p>" for name, text in section.says]
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
    "experts without a row": ("dead_experts",),
    "bits about the class": ("class_information_bits",),
    "subsets apart, bits": ("subset_jensen_shannon_mean",),
    "router cosine": ("router_cosine_mean",),
    "overlap, input": ("overlap_mean", "input"),
    "overlap, output": ("overlap_mean", "output"),
    "inter/intra by expert": ("distance_ratio", "by expert"),
    "by class": ("distance_ratio", "by class"),
    "super-class read": ("superclass_accuracy",),
}


def layer_table(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row for each layer: the header, and the cells as text."""
    columns = {}
    for title, (key, *inside) in COLUMNS.items():
        if key in numbers:
            columns[title] = numbers[key][inside[0]] if inside else numbers[key]
    rows = [
        [f"block {block}", *(_cell(values[layer]) for values in columns.values())]
        for layer, block in enumerate(numbers["blocks"])
    ]
    return ["", *columns], rows


def _cell(value: float) -> str:
    if isinstance(value, (int, np.integer)):
        return str(value)
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def _table(numbers: Mapping[str, Any]) -> str:
    header, rows = layer_table(numbers)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".writing")
    aside.write_bytes(content)
    os.replace(aside, path)
