"""Records the routing of a model: which classes and which parts of an image go to which expert.

Real images at a few noise levels are passed to the model with their labels, and the outputs of its routers are counted
by class. `analysis.py` computes measures from the counts, `figures.py` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.objectives import make_objective
from megapromoe.errors import UserError
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.routers import Router, RouterOutput
from megapromoe.nn.text_condition import TextCondition
from megapromoe.routing_analysis.measures import NO_EXPERT, evenness, information, load

LEVELS = (0.1, 0.5, 0.9)  # quantiles of the training's noise levels


class RoutingError(UserError):
    """The routing of a model cannot be shown, or not with the requested settings."""


@dataclass(frozen=True)
class Tokens:
    """A sample of the routers' input tokens at the middle noise level; the same tokens in every layer."""

    x_LTD: np.ndarray
    """The router's input, float32."""
    expert_LT: np.ndarray
    """The expert with the largest weight; -1: no expert."""
    class_T: np.ndarray
    """The class of each token's image."""


@dataclass(frozen=True)
class Routing:
    """The recorded routing of all images.

    Letters: L MoE layers, M noise levels, C classes, E experts, N images, S tokens of an image.
    """

    blocks: tuple[int, ...]
    """The block of each MoE layer."""
    levels: tuple[float, ...]
    """Quantiles of the training's noise levels."""
    rows_MLCE: np.ndarray
    """Number of rows (pairs of token and expert) of each class and expert, int64."""
    visits_LV: np.ndarray
    """Number of tokens with 0, 1, 2, ... E experts, over all noise levels."""
    expert_LNS: np.ndarray
    """The expert with the largest weight for each token at the middle noise level; -1: no expert."""
    images: np.ndarray
    """The clean images (N, C, H, W)."""
    labels: np.ndarray
    tokens: Tokens | None = None

    @property
    def middle(self) -> float:
        """The noise level of `expert_LNS` and `tokens`."""
        return self.levels[len(self.levels) // 2]

    @property
    def kept_tokens(self) -> Tokens:
        """`tokens`; raises ValueError if none were kept."""
        if self.tokens is None:
            raise ValueError("measure_routing kept no tokens; give it their number")
        return self.tokens

    @property
    def rows_LCE(self) -> np.ndarray:
        """Rows over all noise levels."""
        return self.rows_MLCE.sum(0)

    @property
    def load_LE(self) -> np.ndarray:
        """Share of all rows that each expert processes; 0 for a layer without rows."""
        return load(self.rows_LCE.sum(1))

    @property
    def load_MLE(self) -> np.ndarray:
        """`load_LE` at each noise level."""
        return load(self.rows_MLCE.sum(2))

    @property
    def share_LCE(self) -> np.ndarray:
        """Share of each class's rows that each expert processes; 0 for a class without images."""
        return load(self.rows_LCE)

    @property
    def information_L(self) -> np.ndarray:
        """Mutual information of class and expert in bits; see `measures.information`."""
        return information(self.rows_LCE)

    def numbers(self) -> dict[str, Any]:
        """The numbers for JSON; layers are in the order of `blocks`."""
        experts = self.rows_MLCE.shape[-1]
        return {
            "blocks": list(self.blocks),
            "images": len(self.images),
            "load": self.load_LE.round(4).tolist(),
            "load_max_over_mean": (self.load_LE.max(1) * experts).round(4).tolist(),
            "load_entropy": evenness(self.load_LE).round(4).tolist(),
            "experts": experts,
            "dead_experts": (self.load_LE == 0).sum(1).tolist(),
            "class_information_bits": self.information_L.round(4).tolist(),
            "class_share": self.share_LCE.round(4).tolist(),
        }


class RouterCall(NamedTuple):
    """The input of a router, and what it returned."""

    x_BSD: Tensor
    routed: RouterOutput


@contextmanager
def recorded(model: DiT) -> Iterator[list[RouterCall]]:
    """Records the calls of the model's routers during the block, in the order of the layers."""
    calls: list[RouterCall] = []

    def record(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: RouterOutput) -> None:
        calls.append(RouterCall(inputs[0], output))

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def chosen_layers(config: Config, blocks: Sequence[int] | None, levels: Sequence[float]) -> list[int]:
    """The indices of `blocks` (None: all) among the model's MoE layers.

    Raises RoutingError for a model without experts, and for blocks or noise levels that are not valid.
    """
    with_experts = config.model.moe_blocks
    if not with_experts:
        what = "dense model has no experts" if config.model.router == "dense" else "model without a router has no rows"
        raise RoutingError(f"model.router = {config.model.router!r}: a {what} and no routing; give another run")
    problems = [f"levels: {level} must lie in (0, 1)" for level in levels if not 0 < level < 1]
    problems += ["levels: at least one is needed"] * (not levels)
    if blocks is not None and (not blocks or not set(blocks) <= set(with_experts)):
        unknown = ", ".join(str(b) for b in blocks if b not in with_experts) or "none"
        problems.append(f"layers: {unknown}: must be blocks with experts: {', '.join(map(str, with_experts))}")
    if problems:
        raise RoutingError("; ".join(problems))
    return [with_experts.index(block) for block in (with_experts if blocks is None else sorted(set(blocks)))]


def measure_routing(
    model: DiT,
    config: Config,
    dataset: Dataset,
    images: int = 500,
    levels: Sequence[float] = LEVELS,
    blocks: Sequence[int] | None = None,
    tokens: int = 0,
    progress: Callable[[int], Any] = lambda images: None,
) -> Routing:
    """Records the routing of up to `images` real images, spread evenly over the data set, at each of `levels`.

    Args:
        model: unsharded, in eval mode.
        config: of the model.
        dataset: the images.
        images: maximum number of images.
        levels: quantiles of the training's noise levels, in (0, 1).
        blocks: blocks whose MoE layers are recorded; None: all.
        tokens: number of tokens of the middle level to keep, sampled uniformly with a fixed seed.
        progress: called with the number of images of each forward pass.

    Raises RoutingError for a model without experts, and for blocks or noise levels that are not valid.
    """
    layers = chosen_layers(config, blocks, levels)
    m, levels = config.model, tuple(sorted(levels))
    L, E, C, S = len(layers), m.num_experts, m.num_classes, m.tokens
    N = min(images, len(dataset))
    picked_N = np.linspace(0, len(dataset) - 1, N).astype(np.int64)
    clean_NCHW, labels_N = dataset.read(picked_N)
    noise_NCHW = image_noise(config.sample.seed, picked_N.tolist(), dataset.shape)

    rows_MLCE = np.zeros((len(levels), L, C, E), dtype=np.int64)
    visits_LV = np.zeros((L, E + 1), dtype=np.int64)
    expert_LNS = np.full((L, N, S), NO_EXPERT)
    kept_T = np.sort(np.random.default_rng(0).choice(N * S, min(tokens, N * S), replace=False))
    x_LTD = np.zeros((L, len(kept_T), m.hidden_size), dtype=np.float32)

    def labels_of(part: slice) -> Tensor:
        return torch.from_numpy(labels_N[part])

    for number, part, calls in router_calls(model, config, clean_NCHW, noise_NCHW, labels_of, levels, progress):
        first, label_B = part.start, labels_N[part]
        B = len(label_B)
        kept = slice(*np.searchsorted(kept_T, [first * S, (first + B) * S]))
        for layer, (x_BSD, routed) in enumerate(calls[place] for place in layers):
            token_R, expert_R = rows_of(routed.assignment)
            rows_MLCE[number, layer] += count_rows(label_B[token_R // S], expert_R, C, E)
            visits_LV[layer] += count_visits(token_R, B * S, E)
            if number == len(levels) // 2:
                expert_LNS[layer, part] = main_expert(routed.assignment, B * S).reshape(B, S)
                x_TD = x_BSD.flatten(0, 1)
                kept_here = torch.from_numpy(kept_T[kept] - first * S).to(x_TD.device)
                x_LTD[layer, kept] = x_TD[kept_here].float().cpu()
    sample = Tokens(x_LTD, expert_LNS.reshape(L, -1)[:, kept_T], labels_N[kept_T // S]) if tokens else None
    blocks = tuple(m.moe_blocks[place] for place in layers)
    return Routing(blocks, levels, rows_MLCE, visits_LV, expert_LNS, clean_NCHW, labels_N, sample)


def router_calls(
    model: DiT,
    config: Config,
    clean_NCHW: np.ndarray,
    noise_NCHW: Tensor,
    condition_of: Callable[[slice], Tensor | TextCondition],
    levels: Sequence[float],
    progress: Callable[[int], Any],
) -> Iterator[tuple[int, slice, list[RouterCall]]]:
    """Runs images at each noise level in batches: yields index of the level, images of the batch, calls of all routers.

    Args:
        model: unsharded, in eval mode.
        clean_NCHW, noise_NCHW: images and their noise, float32.
        condition_of: the condition of a range of images, on the CPU; none of them is null.
        levels: quantiles of the training's noise levels.
        progress: called with the number of images of each batch after it was used.
    """
    objective, device = make_objective(config), model.x_embedder.proj.weight.device
    for number, level in enumerate(levels):
        for first in range(0, len(clean_NCHW), config.sample.batch):
            part = slice(first, min(first + config.sample.batch, len(clean_NCHW)))
            clean, condition = torch.from_numpy(clean_NCHW[part]), condition_of(part)
            B = len(clean)
            x_BCHW, t_B = objective.corrupt(clean, noise_NCHW[part], torch.full((B,), level))
            with torch.no_grad(), recorded(model) as calls:
                model(x_BCHW.to(device), t_B.to(device), condition.to(device), B)
            yield number, part, calls
            progress(B)


def rows_of(assignment: TokenAssignment) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of each row, int64 (R,)."""
    return assignment.token_R.cpu().numpy(), assignment.expert_R.cpu().numpy()


def count_rows(group_R: np.ndarray, expert_R: np.ndarray, groups: int, experts: int) -> np.ndarray:
    """Number of rows of each group and expert, int64 (groups, experts)."""
    return np.bincount(group_R * experts + expert_R, minlength=groups * experts).reshape(groups, experts)


def count_visits(token_R: np.ndarray, tokens: int, experts: int) -> np.ndarray:
    """Number of tokens with 0, 1, 2, ... experts, int64 (experts + 1,)."""
    return np.bincount(np.bincount(token_R, minlength=tokens), minlength=experts + 1)


def main_expert(assignment: TokenAssignment, tokens: int) -> np.ndarray:
    """The expert with the largest weight of each token, int64 (tokens,); NO_EXPERT for a token without an expert."""
    token_R, expert_R = rows_of(assignment)
    # For repeated indices numpy keeps the last value: the expert with the largest weight.
    order_R = np.argsort(assignment.weight_R.float().cpu().numpy(), kind="stable")
    expert_T = np.full(tokens, NO_EXPERT)
    expert_T[token_R[order_R]] = expert_R[order_R]
    return expert_T
