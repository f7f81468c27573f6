"""Figures of the routing of a model of texts: groups of tokens, words, images with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from megapromoe.plot_text import literal
from megapromoe.routing_analysis.figures import (
    SHOWN_IMAGES,
    colour_bar,
    examples_figure,
    expert_axis,
    heat_map,
    new_figure,
    panel_axes,
    panel_size,
    stacked,
)
from megapromoe.routing_analysis.text_routing import GroupRows, TextRouting, WordLoads

SHOWN_WORDS = 30
NOTICED = 3  # standard errors from which a cell of a word has a dot
LARGEST_LIFT = 2.0  # of the colour scale


def groups_figure(blocks: Sequence[int], groups: GroupRows) -> Figure:
    """Heat maps of groups of tokens and experts, one per layer."""
    figure = new_figure(*panel_size(len(blocks), 1.1 + 0.24 * len(groups.names)))
    load_LGE = groups.load_LGE
    for layer, ax in enumerate(panel_axes(figure, len(blocks))):
        shown = ax.imshow(load_LGE[layer], vmin=0, vmax=load_LGE.max(), aspect="auto", cmap="viridis")
        ax.set_title(f"block {blocks[layer]}: {groups.information_L[layer]:.2f} bits", fontsize=9)
        expert_axis(ax, load_LGE.shape[-1])
        ax.set_yticks(range(len(groups.names)), groups.names if layer % 4 == 0 else [], fontsize=8)
    colour_bar(figure, shown, figure.axes, "share of tokens")
    return figure


def words_figure(blocks: Sequence[int], words: WordLoads) -> Figure:
    """Heat maps of the lift of the most frequent words, one per layer; a dot marks clear differences."""
    names = [literal(word[:16]) for word in words.words[:SHOWN_WORDS]]
    figure = new_figure(*panel_size(len(blocks), 1.1 + 0.2 * len(names)))
    limit = np.log2(LARGEST_LIFT)
    with np.errstate(divide="ignore"):
        # Clipped, because infinite values would be drawn like missing ones.
        lift_LWE = np.log2(words.lift_LWE[:, : len(names)]).clip(-limit, limit)
    for layer, ax in enumerate(panel_axes(figure, len(blocks))):
        shown = ax.imshow(lift_LWE[layer], vmin=-limit, vmax=limit, aspect="auto", cmap="RdBu_r")
        word_n, expert_n = np.nonzero(np.abs(words.standard_errors_LWE[layer, : len(names)]) > NOTICED)
        ax.scatter(expert_n, word_n, s=7, color="black", linewidths=0)
        ax.set_title(f"block {blocks[layer]}", fontsize=9)
        expert_axis(ax, lift_LWE.shape[-1])
        ax.set_yticks(range(len(names)), names if layer % 4 == 0 else [], fontsize=8)
    bar = colour_bar(figure, shown, figure.axes, "lift")
    bar.set_ticks([-limit, 0, limit], labels=[f"1/{LARGEST_LIFT:g}", "1", f"{LARGEST_LIFT:g}"])
    return figure


def information_figure(blocks: Sequence[int], levels: Sequence[float], bits_ML: Mapping[str, np.ndarray]) -> Figure:
    """A heat map over layers and noise levels for each title of `bits_ML`."""
    height = 1.3 + 0.3 * len(levels)
    figure = new_figure(panel_size(len(blocks), 1.0)[0], height * len(bits_ML))
    names = [f"{level:g}" for level in levels]
    for part, (kind, values_ML) in zip(stacked(figure, [height] * len(bits_ML)), bits_ML.items(), strict=True):
        ax = part.subplots()
        limits = (0, max(float(np.nan_to_num(values_ML).max()), 1e-3))
        axes = ("block", "noise level")
        heat_map(part, ax, values_ML, blocks, names, axes, "bits", limits, written=len(blocks) <= 16, digits=3)
        ax.set_title(kind, fontsize=10)
    return figure


def captions_figure(measured: TextRouting, side: int) -> Figure:
    """Images under their captions, and the expert of each of their tokens in some layers."""
    count = len(measured.captions)
    examples = np.unique(np.linspace(0, count - 1, SHOWN_IMAGES).round().astype(int)).tolist()
    wrapped = (textwrap.wrap(measured.captions[n], 20, max_lines=4, placeholder="...") for n in examples)
    titles = ["\n".join(map(literal, lines)) for lines in wrapped]
    return examples_figure(measured.routing, examples, titles, side)
