"""Runs the optimizer step of one rank of a layout without its cluster, on small real tensors.

The model has the blocks, experts and layout of the real one and a small width. Its groups are those of
`rehearsal.fake_job`. The gradients of all parameters are ones, so that nothing depends on what other ranks would send.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megapromoe.benchmark.rehearsal import Comparison, Recorder, compare, fake_job, mesh_of_job
from megapromoe.config.options import Config
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build
from megapromoe.planning.traffic import collectives
from megapromoe.planning.zero import zero_of

HEAD = 8  # channels of a head of the small model


@dataclass(frozen=True)
class UpdateRehearsal:
    """The optimizer step of a rank.

    Attributes:
        hidden_size: of the small model.
        messages: of the reduction of gradients, the norm and the update.
    """

    hidden_size: int
    messages: tuple[Comparison, ...]


def small_width(config: Config) -> Config:
    """The configuration with narrow layers, and with images, texts and vectors of a few numbers."""
    m = config.model
    width = HEAD * m.heads

    def scaled(size: int) -> int:
        """In proportion, and a multiple of the heads, which tensor parallelism divides."""
        return 0 if not size else max(1, round(size * width / m.hidden_size / m.heads)) * m.heads

    sizes: dict[str, Any] = {
        name: scaled(getattr(m, name)) for name in ("expert_width", "shared_expert_width", "text_ffn")
    }
    sizes |= {"hidden_size": width, "input_size": 2 * m.patch_size}
    if m.has_text:
        sizes |= {"text_width": 8, "text_tokens": 2}
    if m.align_block:
        sizes |= {"align_width": 8, "align_hidden": 8}
    return replace(config, model=replace(m, **sizes))


def rehearse_update(config: Config, world: int, rank: int) -> UpdateRehearsal | None:
    """Runs the reduction of gradients and the update of a rank, in a process without a job; None at stage 3.

    Stage 3 fetches parameters in the passes of the model, which here are none.
    """
    if zero_of(config).stage == 3:
        return None
    small = small_width(config)
    with fake_job(rank, world):
        mesh = mesh_of_job(small.parallel)
        model = build(small, mesh, placements=small.placements_in_file())
        with patch.object(model, "forward", partial(sum_of_parameters, model)):
            engine = Engine(model, small, mesh)
            EMA(engine, small.train.ema_decays)
            _step(engine)  # DeepSpeed allocates in the first step
            with Recorder() as recorder:
                _step(engine)
            engine.close()
        planned = [c for c in collectives(small, small.layout(world)) if c.phase in ("gradients", "update")]
        return UpdateRehearsal(small.model.hidden_size, compare(recorder.messages, planned, mesh))


def _step(engine: Engine) -> None:
    """An optimizer step, with all its micro-steps."""
    micro_steps = engine.config.train.accumulation
    for micro in range(micro_steps):
        report = engine.micro_step(loss=lambda total, _: (total, total.detach()))
        if micro < micro_steps - 1:
            engine.finish_micro_step()
    engine.step(1e-3, report)


def sum_of_parameters(model: DiT) -> tuple[Tensor, SimpleNamespace]:
    """What the small model returns: a scalar whose gradients are ones, and empty loads of its experts."""
    load = torch.zeros(len(model.config.moe_blocks), model.config.num_experts)
    total = torch.stack([parameter.float().sum() for parameter in model.parameters()]).sum()
    return total, SimpleNamespace(load_ME=load)
