"""Records whole routes of fixed tokens at several steps of a run, from its checkpoints and snapshots.

The steps have the same images, noise, noise levels and conditions, so that only the weights differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import readable_steps
from megapromoe.config.options import Config
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.diffusion.noise import image_noise
from megapromoe.nn.text_condition import TextCondition
from megapromoe.recorded_routes import FixedTokens, Routes
from megapromoe.routing_analysis.captioned_images import images_of_data
from megapromoe.routing_analysis.measures import NO_EXPERT
from megapromoe.routing_analysis.observe import RouterCall, RoutingError, chosen_layers, main_expert, router_calls
from megapromoe.sampling.run_model import load_model
from megapromoe.work_progress import Progress

Condition = Callable[[slice], Tensor | TextCondition]
Calls = Iterator[tuple[int, slice, list[RouterCall]]]


def routes_of_run(
    run: Path,
    config: Config,
    steps: Sequence[int] | None = None,
    weights: str = "ema",
    images: int = 500,
    levels: Sequence[float] = (0.1, 0.5, 0.9),
    blocks: Sequence[int] | None = None,
) -> list[Routes]:
    """Routes of up to `images` training images, spread evenly over the data, at each step and noise level.

    Args:
        run, config: the run directory and its configuration.
        steps: those of checkpoints or snapshots; None: all that have these weights.
        weights: "ema", "ema=DECAY" or "master".
        levels: quantiles of the training's noise levels, in (0, 1).
        blocks: those whose routers are recorded; None: all.

    Raises RoutingError for a model without experts, for blocks, levels or steps that are not valid; and what
    `load_model` and `open_dataset` raise.
    """
    layers = chosen_layers(config, blocks, levels)
    readable = readable_steps(RunDirectory(run).checkpoints, weights)
    wanted = readable if steps is None else sorted(set(steps))
    if missing := [step for step in wanted if step not in readable]:
        listed = ", ".join(map(str, readable)) or "none"
        raise RoutingError(f"steps: {', '.join(map(str, missing))}: the run has {weights} weights of {listed}")
    if len(wanted) < 2:
        raise RoutingError(
            f"{run}: has {weights} weights of {', '.join(map(str, wanted)) or 'no step'}, and drift needs two steps or"
            " more; train with train.snapshot_every, or train.keep_every, to keep them"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clean_NCHW, numbers, condition_of = _inputs(config, images)
    noise_NCHW = image_noise(config.sample.seed, numbers, clean_NCHW.shape[1:])
    ordered = tuple(sorted(float(level) for level in levels))
    of = FixedTokens(
        weights,
        tuple(config.model.moe_blocks[place] for place in layers),
        ordered,
        tuple(numbers),
        config.model.num_experts,
        config.model.tokens,
    )
    recorded = []
    with Progress(len(wanted) * len(ordered) * len(numbers), "image", "routes") as progress:
        for step in wanted:
            model, _, _ = load_model(run, step, weights, device)
            calls = router_calls(model, config, clean_NCHW, noise_NCHW, condition_of, ordered, progress.update)
            recorded.append(Routes(step, of, _experts(calls, of, layers)))
    return recorded


def _inputs(config: Config, count: int) -> tuple[np.ndarray, list[int], Condition]:
    """The clean images, their numbers in the data set, and the conditions of a range of them."""
    dataset = open_dataset(config)
    if config.model.has_text:
        captioned = images_of_data(config, dataset, open_captions(config, dataset), count)
        return captioned.clean_NCHW, captioned.noise_numbers, captioned.condition_of
    picked_N = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64)
    clean_NCHW, labels_N = dataset.read(picked_N)
    return clean_NCHW, picked_N.tolist(), lambda part: torch.from_numpy(labels_N[part])


def _experts(calls_of_levels: Calls, of: FixedTokens, layers: Sequence[int]) -> np.ndarray:
    """See `Routes.expert_LMNS`."""
    expert_LMNS = np.full(of.shape, NO_EXPERT)
    for number, part, calls in calls_of_levels:
        B = part.stop - part.start
        for layer, place in enumerate(layers):
            experts = main_expert(calls[place].routed.assignment, B * of.tokens)
            expert_LMNS[layer, number, part] = experts.reshape(B, of.tokens)
    return expert_LMNS
