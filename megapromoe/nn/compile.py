"""Applies torch.compile to the model in training.

Blocks whose MoE layers send no messages are compiled as a whole, with router, dispatch and experts, and two of them in
one graph. So all pairs of a dense block and an MoE block are one graph. In a model with other blocks these are compiled
as a whole one by one. A block whose MoE layer sends messages is compiled in parts between them (`compiled_parts.py`),
and a block with activation recompute in parts that are recomputed together. Messages of attention and of dense MLPs are
in the graphs: each needs the result of the one before, so that no compiler can exchange them.

Compiled code computes the same, but is written for fewer kernels. Biases of last layers are added with the residual,
whose backward has the sums for their gradients (`GatedResidual`). The SiLU of the conditions is applied once. Gradients
of routing weights reach only the chosen experts, which takes no product (`prototypes.differentiable_chosen`).

The number of conditional images differs from step to step, and with it the sizes of everything that is routed. It
enters as a size that the compiler does not know (torch: *unbacked*), so the same code runs for every number, also for
0, 1 and all. Products of experts are operators that the compiler does not look into (`moe/expert_operators.py`).

With `parallel.recompute=all` the router is eager, because it runs twice with the same decisions. Evaluation is eager:
its batches have other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.nn.compiled_parts import CompiledParts
from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import NO_CONTEXT, AttentionContext, Mlp
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.conditional_mlp import ConditionalMlp
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.unknown_sizes import conditional_images

# Tokens of an image from which the fused reductions of `_options` can occur.
_LONG_SEQUENCE = 4096
# For kernels over rows: with at least so many elements, or rows, inductor's blocks have their largest size.
_TYPICAL_ELEMENTS = 1 << 17
# Consecutive blocks in one graph. The residual of a block and the normalisation of the next are then one kernel, and
# the host checks the conditions of compiled code half as often. More blocks would take longer to compile.
_BLOCKS_IN_GRAPH = 2


def compile_model(model: DiT, backend: str | Callable = "inductor") -> None:
    """Replaces functions of the model by compiled ones, which are used in training mode.

    They are compiled in the first step; pairs of the same kinds of blocks share the compiled code.

    Args:
        model: eager.
        backend: of torch.compile.

    Raises, in the first step, torch's error if a function cannot be compiled as a whole.
    """
    # With dynamic=False a change of shape raises an error instead of compiling again and again.
    options = _options(model, backend)
    compiler = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False, options=options)
    moe_compiler = partial(compiler, options=_moe_options(options, backend))
    run_dense, run_moe, parts = compiler(_run_dense_blocks), moe_compiler(_run_moe_blocks), CompiledParts(moe_compiler)

    def replace(module: nn.Module, name: str, compiled: Callable) -> None:
        setattr(module, name, _in_training(model, getattr(module, name), compiled))

    for module, name in ((model, "embed"), (model.final_layer, "forward")):
        replace(module, name, compiler(getattr(module, name)))
    if all(map(compiles_whole, model.blocks)):
        blocks, align_block = [*model.blocks], model.config.align_block
        split = [*_groups(blocks[:align_block]), *_groups(blocks[align_block:])]
        groups = [(len(group), _CompiledBlocks(group, run_dense, run_moe)) for group in split]
        replace(model, "run_blocks", _run_groups(groups, align_block))
    for block in model.blocks:
        moe = block.mlp if isinstance(block.mlp, MoE) else None
        if compiles_whole(block):
            replace(block, "forward", _CompiledBlocks([block], run_dense, run_moe).forward)
        elif moe is not None and block.recompute == "none":
            replace(block, "forward", parts.block_forward(block))
        else:
            for name in ("attention_half", "residual"):
                replace(block, name, compiler(getattr(block, name)))
            if isinstance(block.mlp, Mlp):
                replace(block.mlp, "forward", compiler(block.mlp.forward))
            if isinstance(block.mlp, ConditionalMlp):
                replace(block.mlp, "forward", _of_unknown_number(moe_compiler(_run_conditional_mlp), block.mlp.forward))
            if moe is not None:
                replace(moe, "run_experts", parts.run_experts(moe))
                if block.recompute != "all":
                    replace(moe, "route", parts.route(moe))
    if all(block.recompute == "none" and isinstance(block.mlp, MoE | ConditionalMlp | Mlp) for block in model.blocks):
        setattr(model, "conditions", _unbound_conditions(len(model.blocks)))  # noqa: B010  # mypy: not a method
        if any(isinstance(block.mlp, MoE) for block in model.blocks):
            replace(model, "auxiliary", compiler(model.auxiliary))


def compiles_whole(block: Any) -> bool:
    """Whether a `Block` is compiled as one graph: its MoE layer is on this rank, and nothing is recomputed."""
    if block.recompute != "none":
        return False
    moe = block.mlp
    return isinstance(moe, ConditionalMlp | Mlp) or (
        isinstance(moe, MoE) and moe.dispatcher.ep == 1 and not moe.region.is_sharded
    )


Functions = Sequence[tuple[Callable, Callable]]
"""`Block.forward` and `Block.modulation` of consecutive blocks."""


# Two functions and not one: torch keeps compiled code by function, and would check that of the other kind in each call.


def _run_dense_blocks(
    blocks: Functions, x_BSD: Tensor, conditions: Sequence[Tensor], context: AttentionContext
) -> Tensor:
    """Consecutive blocks without experts."""
    modulations, context = _modulations(blocks, conditions, context)
    for (forward, _), modulation in zip(blocks, modulations, strict=True):
        x_BSD, _ = forward(x_BSD, modulation, None, 0, context)
    return x_BSD


def _run_moe_blocks(
    blocks: Functions,
    x_BSD: Tensor,
    conditions: Sequence[Tensor],
    y_B: Tensor | None,
    conditional: Tensor,
    context: AttentionContext,
) -> tuple[Tensor, list[MoEAuxiliary]]:
    """Consecutive blocks, with a tensor whose length is the number of conditional images."""
    num_conditional, layers = conditional.shape[0], []
    torch._check(num_conditional <= x_BSD.shape[0])
    modulations, context = _modulations(blocks, conditions, context)
    for (forward, _), modulation in zip(blocks, modulations, strict=True):
        x_BSD, auxiliary = forward(x_BSD, modulation, y_B, num_conditional, context)
        if auxiliary is not None:
            layers.append(auxiliary)
    return x_BSD, layers


def _run_conditional_mlp(forward: Callable, x_BSD: Tensor, conditional: Tensor) -> Tensor:
    """A `ConditionalMlp`, with a tensor whose length is the number of conditional images."""
    torch._check(conditional.shape[0] <= x_BSD.shape[0])
    return forward(x_BSD, conditional.shape[0])


def _of_unknown_number(compiled: Callable, forward: Callable) -> Callable:
    """`ConditionalMlp.forward` in compiled code that does not know the number of conditional images."""

    def function(x_BSD: Tensor, num_conditional: int) -> Tensor:
        return compiled(forward, x_BSD, conditional_images(num_conditional, x_BSD.shape[0]))

    return function


def _modulations(
    blocks: Functions, conditions: Sequence[Tensor], context: AttentionContext
) -> tuple[list[Tensor], AttentionContext]:
    """The modulations of all blocks, before the first, so that no product is between the end of one and the next."""
    modulations = [modulation(c_BD, context) for (_, modulation), c_BD in zip(blocks, conditions, strict=True)]
    return modulations, AttentionContext(*context[:4], is_modulation=True)


class _CompiledBlocks:
    """Consecutive blocks that are compiled together; groups with blocks of the same kinds share the compiled code."""

    def __init__(self, blocks: Sequence[Any], run_dense: Callable, run_moe: Callable) -> None:
        self._blocks = tuple((block.forward, block.modulation) for block in blocks)
        self._has_experts = any(isinstance(block.mlp, MoE | ConditionalMlp) for block in blocks)
        self._run_dense, self._run_moe = run_dense, run_moe

    def __call__(
        self,
        x_BSD: Tensor,
        conditions: Sequence[Tensor],
        y_B: Tensor | None,
        num_conditional: int,
        context: AttentionContext,
    ) -> tuple[Tensor, list[MoEAuxiliary]]:
        if not self._has_experts:
            return self._run_dense(self._blocks, x_BSD, conditions, context), []
        conditional = conditional_images(num_conditional, x_BSD.shape[0])
        return self._run_moe(self._blocks, x_BSD, conditions, y_B, conditional, context)

    def forward(
        self,
        x_BSD: Tensor,
        c_BD: Tensor,
        y_B: Tensor | None,
        num_conditional: int,
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Tensor, MoEAuxiliary | None]:
        """`Block.forward`, if it is one block."""
        x_BSD, layers = self(x_BSD, (c_BD,), y_B, num_conditional, context)
        return x_BSD, layers[0] if layers else None


def _groups(blocks: Sequence[Any]) -> list[Sequence[Any]]:
    """Consecutive blocks that are compiled together."""
    return [blocks[first : first + _BLOCKS_IN_GRAPH] for first in range(0, len(blocks), _BLOCKS_IN_GRAPH)]


def _run_groups(groups: Sequence[tuple[int, Callable]], align_block: int) -> Callable:
    """`DiT.run_blocks` of compiled blocks.

    Args:
        groups: the number of blocks of each group, and the function that runs it.
        align_block: of the model; a group ends after this number of blocks.
    """

    def run_blocks(
        x_BSD: Tensor,
        block_conditions: Sequence[Tensor],
        y_B: Tensor | None,
        num_conditional: int,
        context: AttentionContext,
    ) -> tuple[Tensor, list[MoEAuxiliary], Tensor | None]:
        layers, first = [], 0
        aligned_BSD: Tensor | None = None
        for size, run in groups:
            conditions = tuple(block_conditions[first : first + size])
            x_BSD, group_layers = run(x_BSD, conditions, y_B, num_conditional, context)
            layers += group_layers
            first += size
            if first == align_block:
                aligned_BSD = x_BSD
        return x_BSD, layers, aligned_BSD

    return run_blocks


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

    Torch 2.11 chooses the blocks of kernels whose number of rows it does not know as for 8192 elements: a GELU of these
    rows took 144 µs instead of 67.
    """
    if backend != "inductor":
        return options
    moe_options = {
        "triton.prefer_nd_tiling": True,
        "triton.tiling_prevents_pointwise_fusion": False,
        "unbacked_symint_fallback": _TYPICAL_ELEMENTS,
    }
    return (options or {}) | moe_options
