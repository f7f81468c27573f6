"""torch.compile of what is dense: everything but the routers and the dispatch, whose sizes follow the data.

The compiled stretches are functions of their own, so graphs break between them, at the dispatch, and nowhere else. Each
sees shapes that are the same in every step: a whole micro-batch. What sees only some of its images stays eager: the
unconditional expert, the routers, the routed experts. So does evaluation, which has batches of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megapromoe.models.dit import DiT
from megapromoe.models.layers import Mlp
from megapromoe.models.moe import MoE


def compile_dense(model: DiT, backend: str | Callable = "inductor") -> None:
    """Replaces the model's dense stretches by compiled ones, in training mode.

    Compilation happens at the first step; blocks of one kind share what is compiled. Raises, at the first step, torch's
    error where a stretch cannot be compiled whole. `backend`: of torch.compile.
    """
    stretches: list[tuple[nn.Module, str]] = [(model, "embed"), (model.final_layer, "forward")]
    for block in model.blocks:
        stretches += [(block, "attend"), (block, "add")]
        if isinstance(block.mlp, Mlp):
            stretches.append((block.mlp, "forward"))
        if isinstance(block.mlp, MoE) and block.mlp.shared is not None:
            stretches.append((block.mlp.shared, "partial"))
    for owner, name in stretches:
        setattr(owner, name, _in_training(model, getattr(owner, name), backend))


def _in_training(model: nn.Module, eager: Callable, backend: str | Callable) -> Callable:
    # Shapes that change raise instead of compiling again and again.
    fast = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False)

    def stretch(*arguments):
        return (fast if model.training else eager)(*arguments)

    return stretch
