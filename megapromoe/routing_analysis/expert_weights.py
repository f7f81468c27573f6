"""What the weights of routers and experts show: similarity of the router's vectors, diversity of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megapromoe.config.options import Config
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.layer import MoE
from megapromoe.routing_analysis import figures, measures
from megapromoe.routing_analysis.observe import Routing
from megapromoe.routing_analysis.sections import Section, definitions_of
from megapromoe.work_progress import track

ROUTER_VECTORS = ("prototypes", "centroids", "means", "gate", "classifier.weight")
OVERLAP_NOTE = (
    "Mean over all pairs of experts. Input: left singular vectors of an expert's first matrix as x·W (D×F), the"
    " channels that it reads. Output: those of its second matrix (D×F), the channels that it writes. Hidden: those of"
    " the first matrix as stored (F×D). They are in the space of the hidden units, whose order differs between experts,"
    " so this overlap stays near the random baseline unless experts were initialized as copies."
)


def moe_layers(model: DiT, blocks: Sequence[int]) -> list[MoE]:
    """The MoE layers of blocks."""
    layers = [model.get_submodule(f"blocks.{block}.mlp") for block in blocks]
    return [layer for layer in layers if isinstance(layer, MoE)]


@dataclass(frozen=True)
class Experts:
    """The comparison of routers' vectors and experts' weights.

    Attributes:
        cosine_LEE: cosines of the vectors of each layer's router.
        overlaps: input, output and hidden overlaps of each layer's experts (E, E).
        k: number of singular vectors.
        baselines: overlaps of random subspaces.
    """

    cosine_LEE: list[np.ndarray]
    overlaps: dict[str, list[np.ndarray]]
    k: int
    baselines: dict[str, float]

    @classmethod
    def of(cls, layers: Sequence[MoE], config: Config, blocks: Sequence[int], top_k: int) -> Experts:
        """Compares the experts of layers; `top_k` as in `Request`."""
        m = config.model
        k = top_k or max(1, min(m.hidden_size, m.moe_width) // 8)
        baselines = {"channels": k / m.hidden_size, "hidden units": k / (m.hidden_projections * m.moe_width)}
        cosine_LEE = [measures.cosine_matrix(router_vectors(moe)) for moe in layers]
        return cls(cosine_LEE, expert_overlaps(layers, blocks, k), k, baselines)

    def mean_overlap(self) -> dict[str, list[float]]:
        """The mean overlap over all pairs of experts, of each layer."""
        return {name: [measures.off_diagonal_mean(o) for o in all_LEE] for name, all_LEE in self.overlaps.items()}

    def numbers(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "router_cosine": self.cosine_LEE,
            "router_cosine_mean": [measures.off_diagonal_mean(cosine_EE) for cosine_EE in self.cosine_LEE],
            "overlap_top_k": self.k,
            "overlap": self.overlaps,
            "overlap_mean": self.mean_overlap(),
            "overlap_of_random_subspaces": self.baselines,
        }

    def sections(self, routing: Routing) -> list[Section]:
        """The sections of the report."""
        return [
            Section(
                "router",
                "Vectors of the router",
                definitions_of("cosine_matrix"),
                figures.matrices_figure(routing, self.cosine_LEE, "cosine"),
            ),
            Section(
                "diversity",
                "Diversity of the experts",
                definitions_of("subspace_overlap"),
                figures.lines_figure(
                    routing,
                    self.mean_overlap(),
                    f"mean overlap, k = {self.k}",
                    {f"random, {name}": value for name, value in self.baselines.items()},
                ),
                [OVERLAP_NOTE],
            ),
        ]


def router_vectors(moe: MoE) -> np.ndarray:
    """The vectors (E, D) of a layer's router, one for each expert."""
    tensors = {**dict(moe.router.named_parameters()), **dict(moe.router.named_buffers())}
    vectors = next(tensors[name] for name in ROUTER_VECTORS if name in tensors)
    return vectors.detach().float().cpu().numpy()


def expert_overlaps(layers: Sequence[MoE], blocks: Sequence[int], k: int) -> dict[str, list[np.ndarray]]:
    """Overlaps (E, E) of each layer's experts: of input channels, output channels and hidden units."""
    out: dict[str, list[np.ndarray]] = {"input": [], "output": [], "hidden": []}
    for moe in track(layers, "layer", "overlap of the experts"):
        first, second = (layer.weight.detach().float().cpu().numpy() for layer in (moe.experts.fc1, moe.experts.fc2))
        for name, weight in (("input", first.swapaxes(1, 2)), ("output", second), ("hidden", first)):
            out[name].append(measures.subspace_overlap(weight, k))
    return out
