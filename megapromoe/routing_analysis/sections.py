"""A section of the routing report, and the definitions of the measures that it prints."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from megapromoe.routing_analysis import figures, measures
from megapromoe.routing_analysis.measures import definition
from megapromoe.routing_analysis.observe import Routing

Table = tuple[list[str], list[list[str]]]
"""Header and rows, as text."""


@dataclass
class Section:
    """A section of the report.

    Attributes:
        name, title: identifier and heading.
        definitions: (name, definition) of each measure in the figure.
        figure: the figure.
        notes: remarks on the figure.
        tables: those below the figure.
    """

    name: str
    title: str
    definitions: list[tuple[str, str]]
    figure: Figure
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


MEASURES = {
    name: getattr(measures, name)
    for name in (
        *("load", "evenness", "information", "subset_load", "kullback_leibler", "jensen_shannon"),
        *("cosine_matrix", "subspace_overlap", "distance_ratio", "clusters", "t_sne"),
    )
}


def definitions_of(*measures: str) -> list[tuple[str, str]]:
    """(name, definition) of measures."""
    return [("t-SNE" if name == "t_sne" else name.replace("_", " "), definition(MEASURES[name])) for name in measures]


def load_sections(routing: Routing, evenness_ML: np.ndarray) -> list[Section]:
    """The sections on the load of the experts, and on its evenness (noise levels, layers)."""
    return [
        Section("load", "Load of the experts", definitions_of("load", "evenness"), figures.load_figure(routing)),
        Section(
            "levels",
            "Load over layers and noise levels",
            definitions_of("evenness"),
            figures.levels_figure(routing, evenness_ML),
            ["Noise levels are quantiles of those in training: 0.1 is nearly clean, 0.9 is nearly noise."],
        ),
    ]
