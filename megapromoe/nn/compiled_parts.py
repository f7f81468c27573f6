"""Blocks that send messages, compiled in parts: a graph for all that is computed between two messages.

Messages are sent and waited for by the eager code of the dispatchers and regions, in the order of the eager model. So
the same work overlaps them, forward and backward, and all ranks send in the same order. The parts of a block with an
MoE layer over expert-parallel ranks::

    begin      attention half, router, rows sorted by expert
                   row counts
    hidden     first half of the shared and unconditional experts
                   rows to the experts
    outputs    routed experts
                   start of the rows back to their tokens
    dense      second half of the shared and unconditional experts
                   end of it
    end        outputs times routing weights added to the tokens, residual

In a tensor-parallel region `begin` is divided before the tokens enter the region, and `end` before the sum over its
ranks; what is between is one part, `local`, if all experts are on one rank. Messages of attention and of routers are in
the graph of `begin`, which is the same on all ranks.

With activation recompute, attention half, router, experts and residual are parts: they are recomputed one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from megapromoe.nn.layers import NO_CONTEXT, AttentionContext
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.dense_experts import Biases, DenseHidden, DenseOutputs, add_biases
from megapromoe.nn.moe.dispatcher import ArrangedRows, ExpertOutputs, OutputRows, ReceivedRows, SentRows
from megapromoe.nn.moe.expert_linear import expert_precision
from megapromoe.nn.moe.layer import ExpertInputs, Experts, MoE, auxiliary_of
from megapromoe.nn.moe.routers import RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.moe.row_permutations import DispatchMetadata
from megapromoe.nn.unknown_sizes import (
    Sizes,
    check_rows,
    conditional_images,
    of_unknown_size,
    routed_tokens,
    typical_images,
    typical_rows,
    unknown_rows,
    unknown_size,
)


class Routed(NamedTuple):
    """A block after its router."""

    x_BSD: Tensor
    """The residual stream of the image."""
    gate_BD: Tensor
    text_BND: Tensor | None
    h_BSD: Tensor
    """The input of the experts."""
    output: RouterOutput


class Begun(NamedTuple):
    """A block whose rows are sorted by expert."""

    x_BSD: Tensor
    gate_BD: Tensor
    text_BND: Tensor | None
    h_BSD: Tensor
    metadata: DispatchMetadata
    arranged: ArrangedRows
    auxiliary: MoEAuxiliary


# ---- the parts, each a graph


def choose(
    moe: MoE, h_BSD: Tensor, y_B: Tensor | None, sizes: Sizes, scored_BSD: Tensor | None = None
) -> tuple[Tensor, RouterOutput]:
    """`MoE.route`."""
    torch._check(sizes.conditional.shape[0] <= h_BSD.shape[0])
    inputs, routed = MoE.route(moe, h_BSD, sizes.conditional.shape[0], y_B, RoutingCache(), scored_BSD)
    return expert_precision(inputs.x_BSD), routed


def route(
    block: Any, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, sizes: Sizes, context: AttentionContext
) -> Routed:
    """Attention half and router."""
    x_BSD, h_BSD, gate_BD, text_BND, scored_BSD = block.attention_half(x_BSD, c_BD, context)
    return Routed(x_BSD, gate_BD, text_BND, *choose(block.mlp, h_BSD, y_B, sizes, scored_BSD))


def begin(
    block: Any, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, sizes: Sizes, context: AttentionContext
) -> Begun:
    """`route`, and the rows sorted by expert."""
    x_BSD, gate_BD, text_BND, h_BSD, output = route(block, x_BSD, c_BD, y_B, sizes, context)
    metadata, arranged = _arrange(block.mlp, h_BSD, output.assignment, sizes)
    return Begun(x_BSD, gate_BD, text_BND, h_BSD, metadata, arranged, auxiliary_of(output, arranged.dropped))


def arrange(
    moe: MoE, h_BSD: Tensor, assignment: TokenAssignment, sizes: Sizes
) -> tuple[DispatchMetadata, ArrangedRows]:
    """The rows of an assignment that this rank computes, sorted by expert."""
    num_routed_tokens = routed_tokens(moe, h_BSD.shape, sizes)
    units = num_routed_tokens if assignment.top_k else assignment.expert_R.shape[0]
    check_rows(assignment, units * max(assignment.top_k, 1))
    share = None if sizes.share is None else (sizes.share[0].shape[0], sizes.share[1].shape[0])
    if share is not None:
        torch._check(share[0] + share[1] <= units)
    assignment = moe.dispatcher.shard(assignment, num_routed_tokens, share)
    if share is not None:
        check_rows(assignment, share[1] * max(assignment.top_k, 1))
    return _arrange(moe, h_BSD, assignment, sizes)


def hidden(moe: MoE, h_BSD: Tensor, sizes: Sizes) -> DenseHidden:
    """The first half of the shared and unconditional experts."""
    x_TD = h_BSD.flatten(0, 1)
    return moe.dense_hidden(x_TD, x_TD[routed_tokens(moe, h_BSD.shape, sizes) :])


def outputs(experts: Experts, received: ReceivedRows) -> Tensor:
    """The routed experts."""
    return received.outputs(experts)


def dense(moe: MoE, h_BSD: Tensor, hidden: DenseHidden) -> DenseOutputs:
    """The second half of the shared and unconditional experts."""
    return moe.dense_outputs(h_BSD.flatten(0, 1), hidden)


def combine(
    moe: MoE, rows: OutputRows, metadata: DispatchMetadata, dense: DenseOutputs, shape: torch.Size, sizes: Sizes
) -> Tensor:
    """The sum of all outputs, without the biases of a region; `shape`: (B, S, D)."""
    num_routed_tokens = routed_tokens(moe, shape, sizes)
    num_rows, first_token = metadata.order_R.shape[0], 0
    if metadata.top_k and not metadata.is_shard:
        num_rows = num_routed_tokens * metadata.top_k
    elif sizes.share is not None and metadata.top_k:
        first_token, num_tokens = sizes.share[0].shape[0], sizes.share[1].shape[0]
        torch._check(first_token + num_tokens <= num_routed_tokens)
        num_rows = num_tokens * metadata.top_k
    check_rows(metadata, num_rows)
    check_rows(rows, num_rows)
    metadata = DispatchMetadata(*metadata[:5], first_token, metadata.is_shard)
    if dense.null_TD is not None:
        torch._check(dense.null_TD.shape[0] == dense.y_TD.shape[0] - num_routed_tokens)
    return moe.combine(ExpertOutputs(metadata, rows, None), dense, num_routed_tokens).view(shape)


def end(
    block: Any,
    begun: tuple[Tensor, Tensor, Tensor | None],
    rows: OutputRows,
    metadata: DispatchMetadata,
    dense: DenseOutputs,
    sizes: Sizes,
) -> Tensor:
    """`combine` and the residual; `begun`: the first fields of `Begun`."""
    x_BSD, gate_BD, text_BND = begun
    return block.residual(x_BSD, gate_BD, combine(block.mlp, rows, metadata, dense, x_BSD.shape, sizes), text_BND)


def local(moe: MoE, h_BSD: Tensor, assignment: TokenAssignment, sizes: Sizes) -> tuple[Tensor, Biases, Tensor | None]:
    """All of `MoE.run_experts` that is within the region; if all experts are on this rank."""
    metadata, arranged = arrange(moe, h_BSD, assignment, sizes)
    sent, num_routed_tokens = arranged.send(), routed_tokens(moe, h_BSD.shape, sizes)
    dense_hidden = hidden(moe, h_BSD, sizes)
    expert_outputs = ExpertOutputs(metadata, sent.run_experts(moe.experts), arranged.dropped)
    dense_outputs = dense(moe, h_BSD, dense_hidden)
    y_BSD = moe.combine(expert_outputs, dense_outputs, num_routed_tokens).view(h_BSD.shape)
    return y_BSD, dense_outputs.biases, arranged.dropped


def biased(moe: MoE, y_BSD: Tensor, biases: Biases, sizes: Sizes) -> Tensor:
    """The biases of a region, added to the sum over its ranks."""
    num_routed_tokens = routed_tokens(moe, y_BSD.shape, sizes)
    return add_biases(y_BSD.flatten(0, 1), biases, num_routed_tokens).view(y_BSD.shape)


def finish(
    block: Any, begun: tuple[Tensor, Tensor, Tensor | None], y_BSD: Tensor, biases: Biases, sizes: Sizes
) -> Tensor:
    """`biased` and the residual."""
    x_BSD, gate_BD, text_BND = begun
    return block.residual(x_BSD, gate_BD, biased(block.mlp, y_BSD, biases, sizes), text_BND)


def _arrange(
    moe: MoE, h_BSD: Tensor, assignment: TokenAssignment, sizes: Sizes
) -> tuple[DispatchMetadata, ArrangedRows]:
    B, S, _ = h_BSD.shape
    routed_TD = h_BSD.flatten(0, 1)[: routed_tokens(moe, h_BSD.shape, sizes)]
    return moe.dispatcher.arrange(routed_TD, assignment, B * S)


# ---- the functions of a block and of a layer that they replace


class CompiledParts:
    """The functions of blocks and MoE layers, of which all parts are compiled; blocks share the compiled code."""

    def __init__(self, compile: Callable[[Callable], Callable]) -> None:
        self._compile = compile
        self._compiled: dict[Callable, Callable] = {}

    def block_forward(self, block: Any) -> Callable:
        """`Block.forward` of a block with an MoE layer, without recomputation."""
        moe: MoE = block.mlp

        def forward(
            x_BSD: Tensor, c_BD: Tensor, y_B: Tensor | None, number: int, context: AttentionContext = NO_CONTEXT
        ) -> tuple[Tensor, MoEAuxiliary]:
            sizes = Sizes(conditional_images(number, x_BSD.shape[0]))
            if moe.region.is_sharded:
                routed = self._run(route, block, x_BSD, c_BD, y_B, sizes, context)
                parts = self._in_region(moe, routed.h_BSD, routed.output.assignment, number)
                y_BSD, biases, dropped, sizes = parts
                y_BSD = moe.region.reduce_from_region(y_BSD)
                return self._run(finish, block, routed[:3], y_BSD, biases, sizes), auxiliary_of(routed.output, dropped)
            begun = self._run(begin, block, x_BSD, c_BD, y_B, sizes, context)
            rows, dense_outputs = self._between(moe, begun.h_BSD, begun.arranged, sizes)
            metadata = unknown_rows(begun.metadata, typical_rows(moe, begun.h_BSD))
            return self._run(end, block, begun[:3], rows, metadata, dense_outputs, sizes), begun.auxiliary

        return forward

    def route(self, moe: MoE) -> Callable:
        """`MoE.route`, if no second pass has to route as the first."""

        def route(
            x_BSD: Tensor,
            num_conditional: int,
            y_B: Tensor | None,
            routing_cache: RoutingCache,
            scored_BSD: Tensor | None = None,
        ) -> tuple[ExpertInputs, RouterOutput]:
            images = x_BSD.shape[0] if moe.unconditional is None else num_conditional
            sizes = Sizes(conditional_images(num_conditional, x_BSD.shape[0]))
            x_BSD, routed = self._run(choose, moe, x_BSD, y_B, sizes, scored_BSD)
            return ExpertInputs(x_BSD, routed.assignment, images), routed

        return route

    def run_experts(self, moe: MoE) -> Callable:
        """`MoE.run_experts`."""

        def run_experts(
            x_BSD: Tensor, assignment: TokenAssignment, num_routed_images: int
        ) -> tuple[Tensor, Tensor | None]:
            y_BSD, biases, dropped, sizes = self._in_region(moe, x_BSD, assignment, num_routed_images)
            if moe.region.is_sharded:
                y_BSD = self._run(biased, moe, moe.region.reduce_from_region(y_BSD), biases, sizes)
            return y_BSD, dropped

        return run_experts

    def _in_region(
        self, moe: MoE, h_BSD: Tensor, assignment: TokenAssignment, num_routed_images: int
    ) -> tuple[Tensor, Biases, Tensor | None, Sizes]:
        """The partial output, the biases to add, the share of dropped rows, and the sizes."""
        B, S, _ = h_BSD.shape
        sizes = Sizes(conditional_images(num_routed_images, B))
        assignment = unknown_rows(assignment, typical_rows(moe, h_BSD))
        h_BSD = moe.region.copy_to_region(h_BSD)
        if moe.dispatcher.divides_rows:
            share = assignment.share(moe.region, num_routed_images * S)
            units = typical_rows(moe, h_BSD) // max(assignment.top_k, 1)
            sizes = Sizes(sizes.conditional, (of_unknown_size(share[0], units), of_unknown_size(share[1], units)))
        if moe.dispatcher.ep == 1:
            return *self._run(local, moe, h_BSD, assignment, sizes), sizes
        metadata, arranged = self._run(arrange, moe, h_BSD, assignment, sizes)
        rows, dense_outputs = self._between(moe, h_BSD, arranged, sizes)
        metadata = unknown_rows(metadata._replace(first_token=0), typical_rows(moe, h_BSD))
        y_BSD = self._run(combine, moe, rows, metadata, dense_outputs, h_BSD.shape, sizes)
        return y_BSD, dense_outputs.biases, arranged.dropped, sizes

    def _between(
        self, moe: MoE, h_BSD: Tensor, arranged: ArrangedRows, sizes: Sizes
    ) -> tuple[OutputRows, DenseOutputs]:
        """Sends the rows to their experts and back; the dense experts run between the messages."""
        sent = cast(SentRows, arranged.send())  # experts are on other ranks
        dense_hidden = self._run(hidden, moe, h_BSD, sizes)
        received = unknown_rows(sent.receive(), typical_rows(moe, h_BSD))
        sent_outputs = sent.send_back(self._run(outputs, moe.experts, received))
        null_tokens = (h_BSD.shape[0] - typical_images(h_BSD.shape[0])) * h_BSD.shape[1]
        for null_hidden in dense_hidden.unconditional:
            unknown_size(null_hidden, null_tokens)
        dense_outputs = self._run(dense, moe, h_BSD, dense_hidden)
        if dense_outputs.null_TD is not None:
            unknown_size(dense_outputs.null_TD, null_tokens)
        return unknown_rows(sent_outputs.wait(), typical_rows(moe, h_BSD)), dense_outputs

    def _run(self, part: Callable, *arguments: Any) -> Any:
        if part not in self._compiled:
            self._compiled[part] = self._compile(part)
        return self._compiled[part](*arguments)
