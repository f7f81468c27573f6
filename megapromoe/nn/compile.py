"""Applies torch.compile to the model in training.

A block whose MoE layer sends no messages is compiled as a whole: one graph for all dense blocks, and one for all MoE
blocks, with router, dispatch and experts. A block whose MoE layer sends messages is compiled in parts between them
(`compiled_parts.py`), and a block with activation recompute in parts that are recomputed together. Messages of
attention and of dense MLPs are in the graphs: each needs the result of the one before, so that no compiler can exchange
them.

The number of conditional images differs from step to step, and with it the sizes of everything that is routed. It
enters as a size that the compiler does not know (torch: *unbacked*), so the same code runs for every number, also for
0, 1 and all. Products of experts are operators that the compiler does not look into (`moe/expert_operators.py`).

With `parallel.recompute=all` the router is eager, because it runs twice with the same decisions. Evaluation is eager:
its batches have other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.nn.compiled_parts import CompiledParts
from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import NO_CONTEXT, AttentionContext, Mlp
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.unknown_sizes import conditional_images

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
    # With dynamic=False a change of shape raises an error instead of compiling again and again.
    options = _options(model, backend)
    compiler = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False, options=options)
    moe_compiler = partial(compiler, options=_moe_options(options, backend))
    run_dense, run_moe, parts = compiler(_run_dense_block), moe_compiler(_run_moe_block), CompiledParts(moe_compiler)

    def replace(module: nn.Module, name: str, compiled: Callable) -> None:
        setattr(module, name, _in_training(model, getattr(module, name), compiled))

    for module, name in ((model, "embed"), (model.final_layer, "forward")):
        replace(module, name, compiler(getattr(module, name)))
    for block in model.blocks:
        moe = block.mlp if isinstance(block.mlp, MoE) else None
        if compiles_whole(block):
            forward = block.forward
            replace(block, "forward", _moe_block(forward, run_moe) if moe else _dense_block(forward, run_dense))
        elif moe is not None and block.recompute == "none":
            replace(block, "forward", parts.block_forward(block))
        else:
            for name in ("attention_half", "residual"):
                replace(block, name, compiler(getattr(block, name)))
            if isinstance(block.mlp, Mlp):
                replace(block.mlp, "forward", compiler(block.mlp.forward))
            if moe is not None:
                replace(moe, "run_experts", parts.run_experts(moe))
                if block.recompute != "all":
                    replace(moe, "route", parts.route(moe))
    if all(block.recompute == "none" and isinstance(block.mlp, MoE | Mlp) for block in model.blocks):
        setattr(model, "conditions", _unbound_conditions(len(model.blocks)))  # noqa: B010  # mypy: not a method
        if any(isinstance(block.mlp, MoE) for block in model.blocks):
            replace(model, "auxiliary", compiler(model.auxiliary))


def compiles_whole(block: Any) -> bool:
    """Whether a `Block` is compiled as one graph: its MoE layer is on this rank, and nothing is recomputed."""
    if block.recompute != "none":
        return False
    moe = block.mlp
    return isinstance(moe, Mlp) or (
        isinstance(moe, MoE) and moe.dispatcher.placement.ep == 1 and not moe.region.is_sharded
    )


# Two functions and not one: torch keeps compiled code by function, and would check that of the other kind in each call.


def _run_dense_block(eager: Callable, x_BSD: Tensor, c_BD: Tensor, context: AttentionContext) -> tuple[Tensor, None]:
    """`Block.forward` of a block without experts."""
    return eager(x_BSD, c_BD, None, 0, context)


def _run_moe_block(
    eager: Callable, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, conditional: Tensor, context: AttentionContext
) -> tuple[Tensor, MoEAuxiliary]:
    """`Block.forward`, with a tensor whose length is the number of conditional images."""
    num_conditional = conditional.shape[0]
    torch._check(num_conditional <= x_BSD.shape[0])
    return eager(x_BSD, c_BD, y_B, num_conditional, context)


def _dense_block(eager: Callable, run: Callable) -> Callable:
    def forward(
        x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, num_conditional: int, context: AttentionContext = NO_CONTEXT
    ) -> tuple[Tensor, None]:
        return run(eager, x_BSD, c_BD, context)

    return forward


def _moe_block(eager: Callable, run: Callable) -> Callable:
    def forward(
        x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, num_conditional: int, context: AttentionContext = NO_CONTEXT
    ) -> tuple[Tensor, MoEAuxiliary]:
        return run(eager, x_BSD, c_BD, y_B, conditional_images(num_conditional, x_BSD.shape[0]), context)

    return forward


def _in_training(model: nn.Module, eager: Callable, compiled: Callable) -> Callable:
    """The compiled function in training mode, the eager one otherwise."""

    def function(*arguments: Any) -> Any:
        return (compiled if model.training else eager)(*arguments)

    return function


def _unbound_conditions(count: int) -> Callable:
    """`DiT.conditions`, such that backward adds the gradients of all blocks at once, not one after the other."""

    def conditions(c_BD: Tensor, modulation: Tensor | None) -> tuple[Tensor, ...]:
        if modulation is None:
            return c_BD.expand(count + 1, *c_BD.shape).unbind()
        return *modulation.expand(count, *modulation.shape).unbind(), c_BD

    return conditions


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


def _moe_options(options: dict[str, Any] | None, backend: str | Callable) -> dict[str, Any] | None:
    """Options for graphs that gather rows by an index.

    On GPUs, inductor gives a block of a kernel some rows and columns instead of consecutive elements. The index is then
    the same for a whole row, and elements are loaded several at a time: a gather of rows of ProMoE-L takes 15 µs
    instead of 38 (H200, torch 2.11).
    """
    if backend != "inductor":
        return options
    return (options or {}) | {"triton.prefer_nd_tiling": True, "triton.tiling_prevents_pointwise_fusion": False}
