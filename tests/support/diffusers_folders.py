"""Random models in folders of `megapromoe.diffusers`, and our sampler's pictures of the same models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from support.golden_states import random_state
from support.sampled_runs import tiny

from megapromoe.conversion.diffusers_folder import FolderParts
from megapromoe.conversion.exports import export
from megapromoe.conversion.state import State
from megapromoe.conversion.upcycle import _load_model
from megapromoe.diffusion.image_grid import generate
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.samplers import Condition
from megapromoe.nn.dit import DiT

SMALL = ("model.num_experts=3", "sample.guidance=2.5", "sample.batch=64")


def state_with(*overrides: str) -> State:
    """A tiny model whose every tensor matters, with averages unlike its weights."""
    state = random_state(tiny(*SMALL, *overrides))
    return replace(state, read=lambda kind, name: 0.2 * state.read(kind, name))


def folder_of_state(state: State, folder: Path, weights: str | None = None, **parts) -> Path:
    export(state, folder, "diffusers", weights, parts=FolderParts(**parts))
    return folder


def model_of(state: State, kind: str = "ema") -> DiT:
    return _load_model(state, kind)


def noise_of(state: State, count: int) -> torch.Tensor:
    """The initial noise of the images 0 .. count - 1 of `megapromoe sample`."""
    m = state.config.model
    return image_noise(state.config.sample.seed, range(count), (m.in_channels, m.input_size, m.input_size))


def our_images(state: State, condition: Sequence[int] | Condition, kind: str = "ema") -> torch.Tensor:
    """What `megapromoe sample` generates, before it is decoded."""
    count = len(condition)
    return generate(model_of(state, kind), state.config, condition, range(count))
