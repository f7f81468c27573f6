"""Golden cases as the state of a checkpoint, for tests of conversion."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from support.golden_cases import FOLDER, config_of, parameters_of
from support.published_run import RECIPE

from megapromoe.checkpoint.format import KINDS
from megapromoe.config.options import Config
from megapromoe.conversion.state import State, model_shapes

PUBLISHED = FOLDER / "published_run.pth"
NAMES = {
    "ours": "run",
    "published": "a.pth",
    "safetensors": "a.safetensors",
    "diffusers": "folder",
    "deepspeed": "deep",
}


def config_that_runs(case: str = "published_run") -> Config:
    """A golden case's config; the digits, its default data, would not fit its model."""
    return replace(config_of(case), train=RECIPE, data=replace(Config().data, source="synthetic"))


def state_of(case: str) -> State:
    """A golden case with moments, averages and buffers of random numbers."""
    config = config_that_runs(case)
    return random_state(config, {("master", name): tensor for name, tensor in parameters_of(case).items()})


def random_state(config: Config, given: Mapping[tuple[str, str], torch.Tensor] | None = None) -> State:
    """A state of random numbers but for `given` tensors, by kind and name."""
    shapes, buffers = model_shapes(config.model)
    generator = torch.Generator().manual_seed(0)
    tensors = {(k, n): torch.randn(s, generator=generator) for k in KINDS for n, s in shapes.items()}
    tensors |= given or {}
    kept = {name: torch.rand(shape, generator=generator) for name, shape in buffers.items()}
    return State(Path("made"), "made", config, 12, 10, KINDS, shapes, kept, lambda k, n: tensors[k, n])
