"""torch.compile of what is dense: everything but the routers and the dispatch, whose sizes follow the data.

The compiled stretches are functions of their own, so graphs break between them, at the dispatch, and nowhere else. Each
sees shapes that are the same in every step: a whole micro-batch. But one: what follows a grouped product of the routed
experts, bias and GELU, is compiled for any number of rows. What else sees only some of the images stays eager: the
unconditional expert and the routers. So does evaluation, which has batches of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.expert_linear import ExpertLinear
from megapromoe.nn.moe.layer import MoE, mlps_of

# Tokens of an image from which the fused reductions of `_options` can occur.
_LONG_SEQUENCE = 4096


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
    for module in model.modules():
        if isinstance(module, MoE):
            stretches += [(mlp, "hidden") for mlp in mlps_of(module.shared)]
    for owner, name in stretches:
        setattr(owner, name, _in_training(model, getattr(owner, name), backend, _options(model, backend)))
    for module in model.modules():
        if isinstance(module, ExpertLinear):
            module.finish = _any_rows(model, module.finish, backend)


def _options(model: DiT, backend: str | Callable) -> dict[str, Any] | None:
    """Options of torch.compile that keep gradients right.

    On GPUs, inductor of torch 2.10 to 2.14 fuses the reductions of a LayerNorm's backward with those of the shift and
    scale after it, where a micro-batch is one image of at least 4096 tokens, and leaves the gradients of some slices of
    the modulation unwritten, without an error. Without that fusion they are right. Source: pytorch issue 193061.
    """
    if backend != "inductor" or model.config.tokens < _LONG_SEQUENCE:
        return None
    return {"triton.mix_order_reduction": False}


def _in_training(
    model: nn.Module, eager: Callable, backend: str | Callable, options: dict[str, Any] | None
) -> Callable:
    # Shapes that change raise instead of compiling again and again.
    fast = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False, options=options)

    def stretch(*arguments):
        return (fast if model.training else eager)(*arguments)

    return stretch


def _any_rows(model: nn.Module, eager: Callable, backend: str | Callable) -> Callable:
    fast = torch.compile(eager, backend=backend, fullgraph=True)

    def finish(y_RF, bias_EF, expert_R):
        if not model.training or y_RF.shape[0] < 2:  # torch compiles anew for a size of 1
            return eager(y_RF, bias_EF, expert_R)
        torch._dynamo.mark_dynamic(y_RF, 0)
        torch._dynamo.mark_dynamic(expert_R, 0)
        return fast(y_RF, bias_EF, expert_R)

    return finish
