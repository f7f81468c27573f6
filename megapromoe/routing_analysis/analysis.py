"""All measures of a run's experts, as numbers and as sections of a report.

Only conditional images are analysed: tokens of null images are processed by the unconditional expert and not routed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.config.class_groups import read_groups
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.nn.dit import DiT
from megapromoe.routing_analysis import figures, measures
from megapromoe.routing_analysis.expert_weights import Experts, moe_layers
from megapromoe.routing_analysis.measures import definition
from megapromoe.routing_analysis.observe import LEVELS, Routing, RoutingError
from megapromoe.routing_analysis.sections import MEASURES, Section, definitions_of, load_sections
from megapromoe.work_progress import track

EACH_CLASS = 20  # up to this number of classes, each class is a subset
RANDOM_SUBSET = 200  # with more classes: number of classes in each of two random subsets, as in the paper
SCATTERED = 3  # layers with a t-SNE plot


@dataclass(frozen=True)
class Request:
    """The settings of a report.

    Attributes:
        images: number of images of the data set.
        levels: quantiles of the training's noise levels.
        layers: blocks; None: all with experts.
        subsets: file with groups of classes; None: see `choose_subsets`.
        tokens: number of tokens for t-SNE and distances.
        top_k: number of singular vectors; 0: an eighth of the smaller dimension of an expert's matrices.
    """

    images: int = 500
    levels: tuple[float, ...] = LEVELS
    layers: tuple[int, ...] | None = None
    subsets: Path | None = None
    tokens: int = 2000
    top_k: int = 0


def check_top_k(config: Config, top_k: int) -> None:
    """Raises RoutingError if the experts' matrices have fewer than `top_k` singular vectors (0: the default)."""
    limit = min(config.model.hidden_size, config.model.moe_width)
    if not 0 <= top_k <= limit:
        raise RoutingError(
            f"top_k = {top_k}: must be in 1..{limit}, the smaller of an expert's numbers of channels and hidden units"
        )


def choose_subsets(config: Config, dataset: Dataset, file: Path | None) -> dict[str, tuple[int, ...]]:
    """The subsets of classes to compare: name -> classes.

    They come from a file. Without one, each class is a subset; with more than 20 classes there are two random subsets.

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
    """Computes all measures; returns them for JSON, and the sections of the report."""
    m, names = config.model, dataset.class_names
    layers = moe_layers(model, routing.blocks)
    tokens = routing.kept_tokens
    evenness_ML = measures.evenness(routing.load_MLE)
    share_LUE = np.stack([measures.subset_load(rows_CE, subsets) for rows_CE in routing.rows_LCE])
    js_LUU = np.stack([measures.pairwise(measures.jensen_shannon, share_UE) for share_UE in share_LUE])
    kl_LUU = np.stack([measures.pairwise(measures.kullback_leibler, share_UE) for share_UE in share_LUE])
    experts = Experts.of(layers, config, routing.blocks, request.top_k)
    ratios = ratios_of(routing)
    mean_LUU = [measures.off_diagonal_mean(js_UU) for js_UU in js_LUU]

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
        **experts.numbers(),
        "distance_ratio": ratios,
        "definitions": {name: definition(measure) for name, measure in MEASURES.items()},
    }
    if m.router == "classification":
        right_CE = np.eye(m.num_experts, dtype=bool)[list(m.superclass_of)]
        rows_L = routing.rows_LCE.sum((1, 2))
        numbers["superclass_accuracy"] = (routing.rows_LCE * right_CE).sum((1, 2)) / np.maximum(rows_L, 1)

    shown = sorted({int(i) for i in np.linspace(0, len(layers) - 1, min(SCATTERED, len(layers))).round()})
    places = [measures.t_sne(tokens.x_LTD[layer]) for layer in track(shown, "layer", "t-SNE")]
    side = m.input_size // m.patch_size
    noise = f"noise level {routing.middle:g}, a quantile of the levels of training"
    unrouted = routing.visits_LV[:, 0].sum() / routing.visits_LV.sum()
    grey = [f"{unrouted:.1%} of the tokens are routed to no expert; they are grey."] if unrouted else []
    sections = [
        Section(
            "classes",
            "Experts and classes",
            definitions_of("load", "information"),
            figures.shares_figure(routing, names),
            [f"Each row of a heat map adds up to 1. Counted over {len(routing.levels)} noise levels."],
        ),
        *load_sections(routing, evenness_ML),
        Section(
            "subsets",
            "Subsets of classes",
            definitions_of("subset_load", "jensen_shannon", "kullback_leibler"),
            figures.subsets_figure(routing, list(subsets), share_LUE, js_LUU),
            ["Kullback-Leibler divergences are in the JSON file, where null means infinite or undefined."],
        ),
        Section(
            "maps",
            "From tokens to experts",
            [("token map", "Images, and for each of their tokens (patches) the expert with the largest weight.")],
            figures.maps_figure(routing, names, side),
            [f"At {noise}.", *grey],
        ),
        Section(
            "tokens",
            "Tokens in the plane",
            definitions_of("t_sne"),
            figures.scatter_figure(routing, places, shown, names),
            [f"{tokens.x_LTD.shape[1]} random inputs of the router, at {noise}.", *grey],
        ),
        Section(
            "distances",
            "Distances of tokens",
            definitions_of("distance_ratio", "clusters"),
            figures.lines_figure(routing, ratios, "inter / intra", {}),
            ["The paper gives 0.75 for a dense DiT-XL/2 and 19.3 for a language model, over 10 clusters."],
        ),
        *experts.sections(routing),
    ]
    return numbers, sections


def ratios_of(routing: Routing) -> dict[str, list[float]]:
    """The distance ratio of each layer's tokens, grouped by class, by expert and by k-means cluster."""
    tokens = routing.kept_tokens
    pairs = list(zip(tokens.x_LTD, tokens.expert_LT, strict=True))
    return {
        "by class": [measures.distance_ratio(x_TD, tokens.class_T) for x_TD, _ in pairs],
        "by expert": [measures.distance_ratio(x_TD, expert_T) for x_TD, expert_T in pairs],
        "by k-means cluster": [measures.distance_ratio(x_TD, measures.clusters(x_TD)) for x_TD, _ in pairs],
    }
