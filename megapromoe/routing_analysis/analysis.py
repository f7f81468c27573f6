"""Every measure of what a run's experts learnt, as numbers and as sections of a report.

It is about labelled images; the tokens of null images, which the unconditional expert takes, are not routed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megapromoe.config.class_groups import read_groups
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.layer import MoE
from megapromoe.routing_analysis import figures, measures
from megapromoe.routing_analysis.measures import definition
from megapromoe.routing_analysis.observe import LEVELS, Routing, RoutingError
from megapromoe.work_progress import track

EACH_CLASS = 20  # up to so many classes each is a subset of its own
RANDOM_SUBSET = 200  # classes of each of the two subsets else, as in the paper
SCATTERED = 3  # layers that t-SNE shows
ROUTER_VECTORS = ("prototypes", "centroids", "gate", "classifier.weight")


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


def check_top_k(config: Config, top_k: int) -> None:
    """Raises RoutingError if experts have no `top_k` singular vectors (0: as many as is usual)."""
    most = min(config.model.hidden_size, config.model.moe_width)
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
    layers = _moe_layers(model, routing.blocks)
    tokens = routing.kept_tokens
    evenness_ML = measures.evenness(routing.load_MLE)
    share_LUE = np.stack([measures.subset_load(rows_CE, subsets) for rows_CE in routing.rows_LCE])
    js_LUU = np.stack([measures.between(measures.jensen_shannon, share_UE) for share_UE in share_LUE])
    kl_LUU = np.stack([measures.between(measures.kullback_leibler, share_UE) for share_UE in share_LUE])
    cosine_LEE = [measures.cosine_matrix(router_vectors(moe)) for moe in layers]
    k = request.top_k or max(1, min(m.hidden_size, m.moe_width) // 8)
    overlaps = expert_overlaps(layers, routing.blocks, k)
    baselines = {"channels": k / m.hidden_size, "hidden units": k / m.moe_width}
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
    places = [measures.t_sne(tokens.x_LTD[layer]) for layer in track(shown, "layer", "t-SNE")]
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
            [f"{tokens.x_LTD.shape[1]} tokens as the router meets them, drawn at random, at {noise}.", *grey],
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


def _moe_layers(model: DiT, blocks: Sequence[int]) -> list[MoE]:
    layers = [model.get_submodule(f"blocks.{block}.mlp") for block in blocks]
    return [layer for layer in layers if isinstance(layer, MoE)]


def router_vectors(moe: MoE) -> np.ndarray:
    """The vectors (E, D) by which a layer's router tells its experts apart."""
    tensors = {**dict(moe.router.named_parameters()), **dict(moe.router.named_buffers())}
    vectors = next(tensors[name] for name in ROUTER_VECTORS if name in tensors)
    return vectors.detach().float().cpu().numpy()


def expert_overlaps(layers: Sequence[MoE], blocks: Sequence[int], k: int) -> dict[str, list[np.ndarray]]:
    """Overlaps (E, E) of each layer's experts: of what they read, of what they write, and of their hidden units."""
    out: dict[str, list[np.ndarray]] = {"input": [], "output": [], "hidden": []}
    for moe in track(layers, "layer", "overlap of the experts"):
        first, second = (layer.weight.detach().float().cpu().numpy() for layer in (moe.experts.fc1, moe.experts.fc2))
        for name, weight in (("input", first.swapaxes(1, 2)), ("output", second), ("hidden", first)):
            out[name].append(measures.subspace_overlap(weight, k))
    return out


def ratios_of(routing: Routing) -> dict[str, list[float]]:
    """The distance ratio of each layer's tokens, grouped in three ways."""
    tokens = routing.kept_tokens
    pairs = list(zip(tokens.x_LTD, tokens.expert_LT, strict=True))
    return {
        "by class": [measures.distance_ratio(x_TD, tokens.class_T) for x_TD, _ in pairs],
        "by expert": [measures.distance_ratio(x_TD, expert_T) for x_TD, expert_T in pairs],
        "by k-means cluster": [measures.distance_ratio(x_TD, measures.clusters(x_TD)) for x_TD, _ in pairs],
    }
