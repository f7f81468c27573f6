"""Applies torch.compile to the parts of the model whose shapes do not depend on the routing.

Each compiled region is a function of its own, so the graph breaks only between them: at the routers and at the
dispatch. All but one have the same shapes in every step, those of a whole micro-batch. The exception is the epilogue of
the routed experts' grouped products (bias and GELU), which is compiled for any number of rows. Code that runs on a part
of the images stays eager: the routers and the unconditional expert. So does evaluation, whose batches have other sizes.
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
    """Replaces the dense functions of the model by compiled ones, which are used in training mode.

    They are compiled in the first step; blocks of the same kind share the compiled code.

    Args:
        model: eager.
        backend: of torch.compile.

    Raises, in the first step, torch's error if a function cannot be compiled as a whole.
    """
    regions: list[tuple[nn.Module, str]] = [(model, "embed"), (model.final_layer, "forward")]
    for block in model.blocks:
        regions += [(block, "attention_half"), (block, "residual")]
        if isinstance(block.mlp, Mlp):
            regions.append((block.mlp, "forward"))
    for module in model.modules():
        if isinstance(module, MoE):
            regions += [(mlp, "hidden") for mlp in mlps_of(module.shared)]
    for module, name in regions:
        setattr(module, name, _in_training(model, getattr(module, name), backend, _options(model, backend)))
    for module in model.modules():
        if isinstance(module, ExpertLinear):
            module.epilogue = _any_number_of_rows(model, module.epilogue, backend)


def _options(model: DiT, backend: str | Callable) -> dict[str, Any] | None:
    """Options of torch.compile that avoid wrong gradients.

    On GPUs, inductor of torch 2.10 to 2.14 fuses the reductions in the backward of a LayerNorm with those of the shift
    and scale after it, if a micro-batch is one image of at least 4096 tokens. It then leaves the gradients of some
    slices of the modulation unwritten, without an error. The option turns this fusion off. Source: pytorch issue
    193061.
    """
    if backend != "inductor" or model.config.tokens < _LONG_SEQUENCE:
        return None
    return {"triton.mix_order_reduction": False}


def _in_training(
    model: nn.Module, eager: Callable, backend: str | Callable, options: dict[str, Any] | None
) -> Callable:
    # With dynamic=False a change of shape raises an error instead of compiling again and again.
    compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False, options=options)

    def region(*arguments):
        return (compiled if model.training else eager)(*arguments)

    return region


def _any_number_of_rows(model: nn.Module, eager: Callable, backend: str | Callable) -> Callable:
    compiled = torch.compile(eager, backend=backend, fullgraph=True)

    def epilogue(y_RF, bias_EF, expert_R):
        if not model.training or y_RF.shape[0] < 2:  # torch compiles a second time for a size of 1
            return eager(y_RF, bias_EF, expert_R)
        torch._dynamo.mark_dynamic(y_RF, 0)
        torch._dynamo.mark_dynamic(expert_R, 0)
        return compiled(y_RF, bias_EF, expert_R)

    return epilogue
