"""Applies torch.compile to the model in training.

Without tensor and expert parallelism each block is compiled as a whole: one graph for all dense blocks, and one for all
MoE blocks, with router, dispatch and experts. The number of conditional images differs from step to step, and with it
the sizes of everything that is routed. It enters as a size that the compiler does not know (torch: *unbacked*), so the
same code runs for every number, also for 0, 1 and all. Products of experts are operators that the compiler does not
look into (`moe/expert_operators.py`).

With tensor or expert parallelism, and with activation recompute, parts of a block are compiled. Each is a function of
its own, so the graph breaks only between them: at the dispatch and the messages. The router is compiled for any number
of conditional images, except with `parallel.recompute=all`, which runs it twice with the same decisions; the epilogue
of the routed experts' grouped products (bias and GELU) for any number of rows. The others have the shapes of a whole
micro-batch. The unconditional expert stays eager.

Evaluation is eager: its batches have other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import NO_CONTEXT, AttentionContext, Mlp
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.expert_linear import ExpertLinear
from megapromoe.nn.moe.layer import ExpertInputs, MoE, mlps_of
from megapromoe.nn.moe.routers import RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache

# Tokens of an image from which the fused reductions of `_options` can occur.
_LONG_SEQUENCE = 4096


def compile_model(model: DiT, backend: str | Callable = "inductor") -> None:
    """Replaces functions of the model by compiled ones, which are used in training mode.

    They are compiled in the first step; blocks of the same kind share the compiled code.

    Args:
        model: eager.
        backend: of torch.compile.

    Raises, in the first step, torch's error if a function cannot be compiled as a whole.
    """
    options = _options(model, backend)
    regions: list[tuple[nn.Module, str]] = [(model, "embed"), (model.final_layer, "forward")]
    run_block = torch.compile(_run_block, backend=backend, fullgraph=True, dynamic=False, options=options)
    run_route = torch.compile(_run_route, backend=backend, fullgraph=True, dynamic=False, options=options)
    for block in model.blocks:
        if compiles_whole(block):
            block.forward = _whole_block(model, block.forward, run_block)
        else:
            regions += _static_regions(block)
            if isinstance(block.mlp, MoE) and block.recompute != "all":
                setattr(block.mlp, "route", _route(model, block.mlp, run_route))  # noqa: B010  # mypy: not a method
            for module in block.modules():
                if isinstance(module, ExpertLinear):
                    module.epilogue = _any_number_of_rows(model, module.epilogue, backend)
    if all(map(compiles_whole, model.blocks)):
        setattr(model, "conditions", _unbound_conditions(len(model.blocks)))  # noqa: B010  # mypy: not a method
        if any(isinstance(block.mlp, MoE) for block in model.blocks):
            regions.append((model, "auxiliary"))
    for module, name in regions:
        setattr(module, name, _in_training(model, getattr(module, name), backend, options))


def compiles_whole(block: Any) -> bool:
    """Whether a `Block` is compiled as one graph: all of it is on this device, and nothing is recomputed."""
    if block.recompute != "none" or block.attn.region.is_sharded:
        return False
    return isinstance(block.mlp, Mlp) or (isinstance(block.mlp, MoE) and block.mlp.dispatcher.placement.ep == 1)


def _run_block(
    eager: Callable, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, conditional: Tensor, context: AttentionContext
) -> tuple[Tensor, MoEAuxiliary | None]:
    """`Block.forward`, with a tensor whose length is the number of conditional images."""
    num_conditional = conditional.shape[0]
    torch._check(num_conditional <= x_BSD.shape[0])
    return eager(x_BSD, c_BD, y_B, num_conditional, context)


def _whole_block(model: DiT, eager: Callable, run_block: Callable) -> Callable:
    def forward(
        x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, num_conditional: int, context: AttentionContext = NO_CONTEXT
    ) -> tuple[Tensor, MoEAuxiliary | None]:
        if not model.training:
            return eager(x_BSD, c_BD, y_B, num_conditional, context)
        return run_block(eager, x_BSD, c_BD, y_B, _unknown_size(num_conditional, x_BSD.shape[0]), context)

    return forward


def _unknown_size(size: int, largest: int) -> Tensor:
    """A tensor whose length, at most `largest`, compiled code does not know.

    Inductor chooses the blocks of its kernels for a typical length. Without a hint it takes the largest, so that the
    null images would be none: it then handles their elements one by one, or divides by zero (torch 2.11).
    """
    tensor = torch.empty(size)
    torch._dynamo.decorators.mark_unbacked(tensor, 0, hint_override=max(largest - max(largest // 8, 1), 1))
    return tensor


def _run_route(
    eager: Callable, x_BSD: Tensor, y_B: Tensor | None, conditional: Tensor
) -> tuple[Tensor, TokenAssignment, RouterOutput]:
    """`MoE.route`, with a tensor whose length is the number of conditional images."""
    num_conditional = conditional.shape[0]
    torch._check(num_conditional <= x_BSD.shape[0])
    inputs, routed = eager(x_BSD, num_conditional, y_B, RoutingCache())
    return inputs.x_BSD, inputs.assignment, routed


def _route(model: DiT, moe: MoE, run_route: Callable) -> Callable:
    eager = moe.route

    def route(
        x_BSD: Tensor, num_conditional: int, y_B: Tensor | None, routing_cache: RoutingCache
    ) -> tuple[ExpertInputs, RouterOutput]:
        if not model.training:
            return eager(x_BSD, num_conditional, y_B, routing_cache)
        images = x_BSD.shape[0] if moe.unconditional is None else num_conditional
        x_BSD, assignment, routed = run_route(eager, x_BSD, y_B, _unknown_size(num_conditional, x_BSD.shape[0]))
        return ExpertInputs(x_BSD, assignment, images), routed

    return route


def _unbound_conditions(count: int) -> Callable:
    """`DiT.conditions`, such that backward adds the gradients of all blocks at once, not one after the other."""

    def conditions(c_BD: Tensor, modulation: Tensor | None) -> tuple[Tensor, ...]:
        if modulation is None:
            return c_BD.expand(count + 1, *c_BD.shape).unbind()
        return *modulation.expand(count, *modulation.shape).unbind(), c_BD

    return conditions


def _static_regions(block: Any) -> list[tuple[nn.Module, str]]:
    """The functions of a `Block` whose shapes do not depend on the routing."""
    regions: list[tuple[nn.Module, str]] = [(block, "attention_half"), (block, "residual")]
    if isinstance(block.mlp, Mlp):
        regions.append((block.mlp, "forward"))
    elif isinstance(block.mlp, MoE):
        regions += [(mlp, "hidden") for mlp in mlps_of(block.mlp.shared)]
    return regions


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
