"""What the experts learnt: which classes and which parts of an image go to which expert.

Real images are corrupted to a few noise levels and shown to the model under their labels; what its routers
answer is counted over classes, and drawn over some of the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from megapromoe.config import Config
from megapromoe.data.builtin import Dataset
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.objectives import make_objective
from megapromoe.models.dit import DiT
from megapromoe.models.routers import Routed, Router

LEVELS = (0.1, 0.5, 0.9)  # quantiles of the training's noise levels
SHOWN_IMAGES, SHOWN_LAYERS = 10, 4  # of the picture's token maps
NOBODY = -1  # in token maps: no expert took the token


class RoutingError(RuntimeError):
    """A model whose routing cannot be shown."""


@dataclass(frozen=True)
class Routing:
    """What was counted, over all images and noise levels.

    L MoE layers, C classes, E experts, N images, S tokens of an image.
    """

    blocks: tuple[int, ...]
    """The block each MoE layer is in."""
    rows_LCE: np.ndarray
    """Rows (pairs of token and expert) of each class for each expert, int64."""
    expert_LNS: np.ndarray
    """The expert with the largest weight for each token at the middle noise level, or -1: none took it."""
    images: np.ndarray
    """The clean images (N, C, H, W)."""
    labels: np.ndarray

    @property
    def load_LE(self) -> np.ndarray:
        """Share of all rows that goes to each expert; 0 for a layer without rows."""
        rows_LE = self.rows_LCE.sum(1)
        return rows_LE / np.maximum(rows_LE.sum(1, keepdims=True), 1)

    @property
    def share_LCE(self) -> np.ndarray:
        """Share of each class's rows that goes to each expert; 0 for a class without images."""
        return self.rows_LCE / np.maximum(self.rows_LCE.sum(2, keepdims=True), 1)

    @property
    def information_L(self) -> np.ndarray:
        """Mutual information of class and expert, bits: 0 if experts take classes alike, at most log2 E."""
        joint_LCE = self.rows_LCE / np.maximum(self.rows_LCE.sum((1, 2), keepdims=True), 1)
        independent_LCE = joint_LCE.sum(1, keepdims=True) * joint_LCE.sum(2, keepdims=True)
        ratio_LCE = np.divide(joint_LCE, independent_LCE, out=np.ones_like(joint_LCE), where=joint_LCE > 0)
        return (joint_LCE * np.log2(ratio_LCE)).sum((1, 2))

    def numbers(self) -> dict[str, Any]:
        """The figures as plain JSON, layers in the order of `blocks`."""
        experts = self.rows_LCE.shape[2]
        entropy_L = -(self.load_LE * np.log(np.maximum(self.load_LE, 1e-300))).sum(1)
        return {
            "blocks": list(self.blocks),
            "images": len(self.images),
            "load": self.load_LE.round(4).tolist(),
            "load_max_over_mean": (self.load_LE.max(1) * experts).round(4).tolist(),
            "load_entropy": (entropy_L / math.log(max(experts, 2))).round(4).tolist(),
            "dead_experts": (self.load_LE == 0).sum(1).tolist(),
            "class_information_bits": self.information_L.round(4).tolist(),
            "class_share": self.share_LCE.round(4).tolist(),
        }


@contextmanager
def recorded(model: DiT) -> Iterator[list[Routed]]:
    """Within the context each forward pass appends what its routers returned, layer by layer."""
    seen: list[Routed] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda *call: seen.append(call[-1])) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_routing(model: DiT, config: Config, dataset: Dataset, images: int = 500) -> Routing:
    """Routes of up to `images` real images, spread evenly over the data set, at each of `LEVELS`.

    Args:
        model: whole, in eval mode.

    Raises RoutingError for a model without experts.
    """
    if not config.model.moe_blocks:
        raise RoutingError("model.router = 'dense': a dense model has no experts, hence no routing to show")
    m = config.model
    L, E, C, S = len(m.moe_blocks), m.num_experts, m.num_classes, m.tokens
    picked_N = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(np.int64)
    clean_NCHW, labels_N = dataset.read(picked_N)
    noise_NCHW = image_noise(config.sample.seed, picked_N, dataset.shape)
    objective, device = make_objective(config), model.pos_embed.device
    rows_LCE = np.zeros((L, C, E), dtype=np.int64)
    expert_LNS = np.full((L, len(picked_N), S), NOBODY)
    for level in LEVELS:
        for first in range(0, len(picked_N), config.sample.batch):
            part = slice(first, first + config.sample.batch)
            clean, label_B = torch.from_numpy(clean_NCHW[part]), labels_N[part]
            x_BCHW, t_B = objective.corrupt(clean, noise_NCHW[part], torch.full((len(clean),), level))
            y_B = torch.from_numpy(label_B).to(device)
            with recorded(model) as seen:
                model(x_BCHW.to(device), t_B.to(device), y_B, len(label_B))
            for layer, routed in enumerate(seen):
                token_R, expert_R, weight_R = (v.float().cpu().numpy() for v in routed.route[:3])
                token_R, expert_R = token_R.astype(np.int64), expert_R.astype(np.int64)
                np.add.at(rows_LCE[layer], (label_B[token_R // S], expert_R), 1)
                if level == LEVELS[len(LEVELS) // 2]:
                    order_R = np.argsort(weight_R, kind="stable")  # numpy keeps the last of several values
                    map_T = np.full(len(label_B) * S, NOBODY)
                    map_T[token_R[order_R]] = expert_R[order_R]
                    expert_LNS[layer, part] = map_T.reshape(-1, S)
    return Routing(config.model.moe_blocks, rows_LCE, expert_LNS, clean_NCHW, labels_N)


def routing_picture(model: DiT, config: Config, dataset: Dataset, path: Path) -> dict[str, Any]:
    """Measures the routing, draws it as a PNG, and returns the numbers, ready for JSON.

    Raises RoutingError for a model without experts.
    """
    routing = measure_routing(model, config, dataset)
    figure = draw(routing, dataset.class_names, config.model.input_size // config.model.patch_size)
    figure.savefig(path, format="png", dpi=110)
    return routing.numbers()


def draw(routing: Routing, class_names: tuple[str, ...], side: int) -> Figure:
    """One figure: a heat-map class by expert for each MoE layer, token maps of some images, the load.

    Args:
        side: tokens along a side of an image.
    """
    L, C, E = routing.rows_LCE.shape
    colours = _colours(E)
    examples = [int(np.flatnonzero(routing.labels == c)[0]) for c in range(C) if (routing.labels == c).any()]
    examples = examples[:SHOWN_IMAGES]
    layers = np.unique(np.linspace(0, L - 1, min(L, SHOWN_LAYERS)).round().astype(int))
    wide = min(L, 4)
    heat_rows = math.ceil(L / wide)
    heights = [heat_rows * 3.4, 0.95 * (1 + len(layers)), 2.6]
    figure = Figure(figsize=(max(10.5, 3.2 * wide), sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would keep a list of all figures
    heat, maps, load = figure.subfigures(3, 1, height_ratios=heights)
    _draw_shares(heat, routing, class_names, wide)
    _draw_maps(maps, routing, examples, layers, side, class_names, colours)
    _draw_load(load, routing, colours)
    return figure


def _colours(experts: int) -> ListedColormap:
    if experts <= 10:
        return ListedColormap(colormaps["tab10"].colors[:experts])
    if experts <= 20:
        return ListedColormap(colormaps["tab20"].colors[:experts])
    return ListedColormap(colormaps["turbo"](np.linspace(0, 1, experts)))


def _draw_shares(figure, routing: Routing, class_names: tuple[str, ...], wide: int) -> None:
    L, C, E = routing.rows_LCE.shape
    figure.suptitle("Share of each class's tokens that goes to each expert", fontsize=11)
    axes = figure.subplots(math.ceil(L / wide), wide, squeeze=False).flatten()
    share_LCE = routing.share_LCE
    for layer, ax in enumerate(axes):
        if layer >= L:
            ax.set_axis_off()
            continue
        shown = ax.imshow(share_LCE[layer], vmin=0, vmax=share_LCE.max(), aspect="auto", cmap="viridis")
        bits = routing.information_L[layer]
        ax.set_title(f"block {routing.blocks[layer]}: {bits:.2f} bits about the class", fontsize=9)
        ax.set_xlabel("expert", fontsize=8)
        ax.set_xticks(range(E))
        if C <= 20:
            ax.set_yticks(range(C), class_names, fontsize=7)
        if layer % wide == 0:
            ax.set_ylabel("class", fontsize=8)
        ax.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes.tolist(), label="share of tokens")


def _draw_maps(figure, routing, examples, layers, side, class_names, colours) -> None:
    figure.suptitle("The expert of each token, images at the middle noise level", fontsize=11)
    axes = figure.subplots(1 + len(layers), len(examples), squeeze=False)
    for column, number in enumerate(examples):
        image = _viewable(routing.images[number])
        axes[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)  # the map is of images without colour
        axes[0, column].set_title(class_names[routing.labels[number]][:12], fontsize=8)
        for row, layer in enumerate(layers, start=1):
            axes[row, column].imshow(_overlay(image, routing.expert_LNS[layer, number], side, colours))
    for ax in axes.flatten():
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image", fontsize=8)
    for row, layer in enumerate(layers, start=1):
        axes[row, 0].set_ylabel(f"block {routing.blocks[layer]}", fontsize=8)


def _draw_load(figure, routing: Routing, colours: ListedColormap) -> None:
    L, E = routing.load_LE.shape
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
    ax.legend(fontsize=7, ncols=min(E + 1, 9), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _viewable(image_CHW: np.ndarray) -> np.ndarray:
    """An image in [0, 1] to look at: colours where there are three channels, else the channels' mean."""
    low, high = image_CHW.min(), image_CHW.max()
    scaled = (image_CHW - low) / max(high - low, 1e-8)
    return scaled.transpose(1, 2, 0) if len(scaled) == 3 else scaled.mean(0)


def _overlay(image: np.ndarray, expert_S: np.ndarray, side: int, colours: ListedColormap) -> np.ndarray:
    """The image's light and dark in the colours of its tokens' experts, grey where none took a token."""
    light = image.mean(2) if image.ndim == 3 else image
    colour = np.where(expert_S[:, None] == NOBODY, 0.5, colours(expert_S.clip(0))[:, :3]).reshape(side, side, 3)
    patch = len(light) // side
    return colour.repeat(patch, axis=0).repeat(patch, axis=1) * (0.6 + 0.4 * light[..., None])
