"""Figures of a model's routing. They are created without pyplot, which would keep a reference to each."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure

from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.io import write_bytes
from megapromoe.nn.dit import DiT
from megapromoe.plot_styles import MARKERS, area_colours, assign
from megapromoe.plot_text import literal
from megapromoe.routing_analysis.measures import NO_EXPERT
from megapromoe.routing_analysis.observe import Routing, measure_routing

SHOWN_IMAGES, SHOWN_LAYERS = 10, 4  # in token maps
NAMED = 20  # up to this number, classes or subsets are labelled individually
GREY = (0.6, 0.6, 0.6)  # of tokens without an expert


def png(figure: Figure, dpi: int = 90) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def routing_picture(model: DiT, config: Config, dataset: Dataset, path: Path) -> dict[str, Any]:
    """Measures the routing, writes a figure of it as a PNG file, and returns the numbers for JSON.

    Raises RoutingError for a model without experts.
    """
    routing = measure_routing(model, config, dataset)
    figure = routing_figure(routing, dataset.class_names, config.model.input_size // config.model.patch_size)
    write_bytes(path, png(figure, dpi=110))
    return routing.numbers()


def routing_figure(routing: Routing, class_names: Sequence[str], side: int) -> Figure:
    """One figure with a heat map of classes and experts for each MoE layer, token maps of some images, and the load.

    Args:
        routing: the measured routing.
        class_names: name of each class.
        side: tokens per side of an image.
    """
    L = len(routing.blocks)
    wide = min(L, 4)
    heat_rows, layers = math.ceil(L / wide), len(_some_layers(L))
    heights = [heat_rows * 3.4, 0.95 * (1 + layers), 2.6]
    figure = new_figure(max(10.5, 3.2 * wide), sum(heights) + 1.2)
    heat, maps, bars = stacked(figure, heights)
    heat.suptitle("Share of each class's tokens that goes to each expert", fontsize=11)
    _draw_shares(heat, routing, class_names)
    maps.suptitle("The expert of each token, images at the middle noise level", fontsize=11)
    examples = _examples_of_classes(routing)
    names = [literal(class_names[routing.labels[number]][:12]) for number in examples]
    _draw_maps(maps, routing, examples, names, side)
    _draw_load(bars, routing)
    return figure


# ---- single figures, for reports


def shares_figure(routing: Routing, class_names: Sequence[str]) -> Figure:
    """Heat maps of classes and experts, one per layer."""
    L, C, _ = routing.rows_LCE.shape
    figure = new_figure(*panel_size(L, 3.3 if C <= NAMED else 4.5))
    _draw_shares(figure, routing, class_names)
    return figure


def maps_figure(routing: Routing, class_names: Sequence[str], side: int) -> Figure:
    """Images of some classes, and the expert of each of their tokens in some layers."""
    examples = _examples_of_classes(routing)
    names = [literal(class_names[routing.labels[number]][:12]) for number in examples]
    return examples_figure(routing, examples, names, side)


def examples_figure(routing: Routing, examples: Sequence[int], titles: Sequence[str], side: int) -> Figure:
    """The images `examples` with titles, and the expert of each of their tokens in some layers."""
    lines = max(title.count("\n") for title in titles)
    figure = new_figure(12, 0.4 + 0.12 * lines + 1.15 * (1 + len(_some_layers(len(routing.blocks)))))
    _draw_maps(figure, routing, examples, titles, side)
    return figure


def load_figure(routing: Routing) -> Figure:
    """Bars: the load of each expert in each layer."""
    figure = new_figure(12, 3.2)
    _draw_load(figure, routing)
    return figure


def levels_figure(routing: Routing, evenness_ML: np.ndarray) -> Figure:
    """Load over layers and noise levels: the evenness in one heat-map, then experts by noise level, a layer each."""
    L, levels = len(routing.blocks), [f"{level:g}" for level in routing.levels]
    width, height = panel_size(L, 1.4 + 0.25 * len(levels))
    first_height = 1.3 + 0.3 * len(levels)
    figure = new_figure(width, height + first_height)
    first, rest = stacked(figure, [first_height, height])
    ax = first.subplots()
    axes = ("block", "noise level")
    heat_map(first, ax, evenness_ML, routing.blocks, levels, axes, "evenness", (0, 1), written=L <= 16)
    ax.set_title("Evenness of the load", fontsize=10)
    load_MLE = routing.load_MLE
    for layer, ax in enumerate(panel_axes(rest, L)):
        shown = ax.imshow(load_MLE[:, layer], vmin=0, vmax=load_MLE.max(), aspect="auto", cmap="viridis")
        ax.set_title(f"block {routing.blocks[layer]}", fontsize=9)
        expert_axis(ax, load_MLE.shape[-1])
        ax.set_yticks(range(len(levels)), levels if layer % 4 == 0 else [], fontsize=7)
        if layer % 4 == 0:
            ax.set_ylabel("noise level", fontsize=8)
    colour_bar(rest, shown, rest.axes, "load")
    return figure


def scatter_figure(routing: Routing, place_LT2: Sequence[np.ndarray], layers: Sequence[int], class_names) -> Figure:
    """Scatter plots of tokens, one row per layer, coloured by expert and by class.

    Args:
        place_LT2: coordinates of the tokens in each of `layers`.
    """
    tokens, E, C = routing.kept_tokens, routing.rows_MLCE.shape[-1], len(class_names)
    figure = new_figure(11.5, 5.0 * len(layers))
    axes = figure.subplots(len(layers), 2, squeeze=False)
    experts = [f"expert {e}" for e in range(E)]
    for row, (layer, place_T2) in enumerate(zip(layers, place_LT2, strict=True)):
        expert_T = tokens.expert_LT[layer]
        _scatter(axes[row, 0], place_T2, expert_T, experts, last=row == len(layers) - 1)
        _scatter(axes[row, 1], place_T2, tokens.class_T, class_names, last=row == len(layers) - 1)
        axes[row, 0].set_ylabel(f"block {routing.blocks[layer]}", fontsize=10)
    axes[0, 0].set_title("by expert", fontsize=10)
    axes[0, 1].set_title("by class" + ("" if C <= NAMED else f" (hue: 0..{C - 1})"), fontsize=10)
    return figure


def subsets_figure(routing: Routing, names: Sequence[str], share_LUE: np.ndarray, apart_LUU: np.ndarray) -> Figure:
    """For each layer the load of the experts over each subset of classes, and the divergences of the subsets."""
    L, U, _ = share_LUE.shape
    labels = [literal(name) for name in names]
    tall = 1.3 + 0.15 * U if U <= NAMED else 3.0
    width, height = panel_size(L, tall)
    figure = new_figure(width, 2 * height)
    apart = "Jensen-Shannon divergence, bits"
    parts = ((share_LUE, "load", "viridis"), (apart_LUU, apart, "magma"))
    for sub, (values, title, colours) in zip(stacked(figure, [height, height]), parts, strict=True):
        top = max(np.nanmax(values, initial=0), 1e-9)
        for layer, ax in enumerate(panel_axes(sub, L)):
            shown = ax.imshow(values[layer], vmin=0, vmax=top, aspect="auto", cmap=colours)
            ax.set_title(f"block {routing.blocks[layer]}", fontsize=9)
            if title == "load":
                expert_axis(ax, values.shape[-1])
            elif U <= NAMED:
                ax.set_xticks(range(U), labels, fontsize=7, rotation=90 if max(map(len, names)) > 2 else 0)
            if U <= NAMED:
                ax.set_yticks(range(U), labels if layer % 4 == 0 else [], fontsize=7)
        colour_bar(sub, shown, sub.axes, title)
    return figure


def matrices_figure(routing: Routing, matrix_LEE: Sequence[np.ndarray], title: str, low: float = -1) -> Figure:
    """A matrix of pairs of experts for each layer."""
    figure = new_figure(*panel_size(len(matrix_LEE), 3.0))
    for layer, ax in enumerate(panel_axes(figure, len(matrix_LEE))):
        colours = "RdBu_r" if low < 0 else "viridis"
        shown = ax.imshow(matrix_LEE[layer], vmin=low, vmax=1, cmap=colours)
        ax.set_title(f"block {routing.blocks[layer]}", fontsize=9)
        E = len(matrix_LEE[layer])
        expert_axis(ax, E)
        ax.set_yticks(range(0, E, _step(E)))
        ax.tick_params(labelsize=7)
        if layer % 4 == 0:
            ax.set_ylabel("expert", fontsize=8)
    colour_bar(figure, shown, figure.axes, title)
    return figure


def lines_figure(
    routing: Routing, lines: Mapping[str, Sequence[float]], title: str, flat: Mapping[str, float]
) -> Figure:
    """Line plots of measures over the layers; the constants `flat` are dotted lines."""
    figure = new_figure(8, 3.2)
    ax = figure.subplots()
    place = np.arange(len(routing.blocks))
    styles = assign([*lines, *flat])
    for name, values in lines.items():
        ax.plot(place, np.asarray(values, dtype=float), label=name, **styles[name].of_line)
    for name, value in flat.items():
        ax.axhline(value, color=styles[name].colour, linestyle=":", linewidth=1.5, label=name)
    ax.set_xticks(
        place, [f"block {block}" for block in routing.blocks], fontsize=8, rotation=90 if len(place) > 8 else 0
    )
    ax.set_ylim(bottom=0)
    ax.set_ylabel(title, fontsize=9)
    ax.tick_params(labelsize=8)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    return figure


# ---- parts


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, without pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def stacked(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    """Subfigures of the given heights, one below the other."""
    return list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def panel_size(L: int, height: float) -> tuple[float, float]:
    """Size of a figure with one panel per layer, four in a row."""
    return max(3.0 * min(L, 4) + 1.2, 6.0), math.ceil(L / 4) * height


def panel_axes(figure, L: int) -> list:
    """Axes for each layer, four in a row; unused axes are removed."""
    wide = min(L, 4)
    axes = figure.subplots(math.ceil(L / wide), wide, squeeze=False).flatten()
    for ax in axes[L:]:
        ax.remove()
    return list(axes[:L])


def _some_layers(L: int) -> np.ndarray:
    return np.unique(np.linspace(0, L - 1, min(L, SHOWN_LAYERS)).round().astype(int))


def _colours(count: int) -> ListedColormap:
    return ListedColormap(area_colours(count))


def _step(count: int) -> int:
    """The step between labelled ticks of an axis with `count` ticks."""
    return 1 if count <= 16 else math.ceil(count / 8)


def expert_axis(ax, experts: int) -> None:
    ax.set_xlabel("expert", fontsize=8)
    ax.set_xticks(range(0, experts, _step(experts)))
    ax.tick_params(labelsize=7)


def heat_map(figure, ax, values, columns, rows, labels, title, limits, written, digits=2) -> None:
    shown = ax.imshow(values, vmin=limits[0], vmax=limits[1], aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel(labels[0], fontsize=8)
    ax.set_ylabel(labels[1], fontsize=8)
    ax.tick_params(labelsize=7)
    if written:
        for (row, column), value in np.ndenumerate(values):
            dark = value < sum(limits) / 2
            ax.text(
                column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
            )
    colour_bar(figure, shown, ax, title)


def colour_bar(figure, shown, axes, label: str) -> Colorbar:
    bar = figure.colorbar(shown, ax=axes)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return bar


def _scatter(ax, place_T2: np.ndarray, group_T: np.ndarray, names: Sequence[str], last: bool) -> None:
    colours = _colours(len(names))
    unrouted = group_T == NO_EXPERT
    ax.scatter(*place_T2[unrouted].T, s=5, color=GREY, linewidths=0, label="no expert")
    named = len(names) <= NAMED
    markers = [MARKERS[group // 6 % len(MARKERS)] if named else MARKERS[0] for group in range(len(names))]
    for marker in dict.fromkeys(markers):  # only six colours are easy to distinguish: each six groups share a marker
        groups = [group for group, marker_of_group in enumerate(markers) if marker_of_group == marker]
        shown_T = ~unrouted & np.isin(group_T, groups)
        ax.scatter(*place_T2[shown_T].T, s=6, marker=marker, color=colours(group_T[shown_T]), linewidths=0)
    ax.set(xticks=[], yticks=[])
    if last and named:
        shown = [
            ax.scatter([], [], s=20, marker=markers[n], color=colours(n), label=literal(name[:14]))
            for n, name in enumerate(names)
        ]
        if unrouted.any():
            shown.append(ax.scatter([], [], s=20, color=GREY, label="no expert"))
        ax.legend(handles=shown, fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)


def _draw_shares(figure, routing: Routing, class_names: Sequence[str]) -> None:
    L, C, E = routing.rows_LCE.shape
    share_LCE = routing.share_LCE
    for layer, ax in enumerate(panel_axes(figure, L)):
        shown = ax.imshow(share_LCE[layer], vmin=0, vmax=share_LCE.max(), aspect="auto", cmap="viridis")
        bits = routing.information_L[layer]
        ax.set_title(f"block {routing.blocks[layer]}: {bits:.2f} bits about the class", fontsize=9)
        expert_axis(ax, E)
        if C <= NAMED:
            ax.set_yticks(range(C), [literal(name[:14]) for name in class_names], fontsize=7)
        if layer % 4 == 0:
            ax.set_ylabel("class", fontsize=8)
    colour_bar(figure, shown, figure.axes, "share of tokens")


def _examples_of_classes(routing: Routing) -> list[int]:
    """The first image of each of some classes."""
    first = [int(np.flatnonzero(routing.labels == c)[0]) for c in np.unique(routing.labels)]
    return [first[i] for i in np.unique(np.linspace(0, len(first) - 1, SHOWN_IMAGES).round().astype(int))]


def _draw_maps(figure, routing: Routing, examples: Sequence[int], titles: Sequence[str], side: int) -> None:
    L, _, E = routing.rows_LCE.shape
    layers, colours = _some_layers(L), _colours(E)
    axes = figure.subplots(1 + len(layers), len(examples), squeeze=False)
    size = 6.5 if any("\n" in title for title in titles) else 8
    for column, number in enumerate(examples):
        image = _viewable(routing.images[number])
        axes[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)  # the colour map applies to images with one channel
        axes[0, column].set_title(titles[column], fontsize=size)
        for row, layer in enumerate(layers, start=1):
            axes[row, column].imshow(_overlay(image, routing.expert_LNS[layer, number], side, colours))
    for ax in axes.flatten():
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image", fontsize=8)
    for row, layer in enumerate(layers, start=1):
        axes[row, 0].set_ylabel(f"block {routing.blocks[layer]}", fontsize=8)


def _draw_load(figure, routing: Routing) -> None:
    L, E = routing.load_LE.shape
    colours = _colours(E)
    ax = figure.subplots()
    for expert in range(E):
        place = np.arange(L) + (expert - (E - 1) / 2) * 0.8 / E
        label = f"expert {expert}"
        ax.bar(place, routing.load_LE[:, expert], 0.72 / E, color=colours(expert), label=label)
    ax.axhline(1 / E, color="black", linewidth=0.8, linestyle="--", label="even")
    ax.set_xticks(range(L), [f"block {block}" for block in routing.blocks], fontsize=8)
    ax.set_ylabel("share of tokens", fontsize=8)
    ax.set_title("Load of the experts", fontsize=11)
    ax.tick_params(labelsize=8)
    if E <= 32:
        ax.legend(fontsize=7, ncols=min(E + 1, 9), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _viewable(image_CHW: np.ndarray) -> np.ndarray:
    """An image scaled to [0, 1]: in colour with three channels, otherwise the mean of the channels."""
    low, high = image_CHW.min(), image_CHW.max()
    scaled = (image_CHW - low) / max(high - low, 1e-8)
    return scaled.transpose(1, 2, 0) if len(scaled) == 3 else scaled.mean(0)


def _overlay(image: np.ndarray, expert_S: np.ndarray, side: int, colours: ListedColormap) -> np.ndarray:
    """The brightness of the image in the colours of its tokens' experts, grey for tokens without an expert."""
    light = image.mean(2) if image.ndim == 3 else image
    colour = np.where(expert_S[:, None] == NO_EXPERT, 0.5, colours(expert_S.clip(0))[:, :3]).reshape(side, side, 3)
    patch = len(light) // side
    return colour.repeat(patch, axis=0).repeat(patch, axis=1) * (0.6 + 0.4 * light[..., None])
