"""Estimates the memory of activations: what layers save for the backward pass, and temporary tensors around its peak.

`saved_tensors` lists the tensors that the layers in `nn/` save for the backward pass of one micro-batch.

Letters as in `cost.py`; b is the size of an activation in bytes. Counts are means, which need not be whole numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

from megapromoe.config.layout import Layout
from megapromoe.config.model_options import (
    BALANCED_ROUTERS,
    BATCH_CHOICE_ROUTERS,
    GATE_ROUTERS,
    PROMOE_ROUTERS,
    ModelConfig,
)
from megapromoe.config.options import Config
from megapromoe.planning.cost import (
    TIME_SINUSOIDS,
    tensors_on_rank,
)
from megapromoe.planning.traffic import (
    Batch,
    routed_images,
    routed_rows,
)
from megapromoe.planning.zero import zero_of

INDEX = 8  # bytes of an int64


class Saved(NamedTuple):
    """One kind of tensor that is saved for the backward pass; `bytes` counts all blocks together.

    `part` is the module that saves it. `rows` is true if it has one row for each row that this rank's experts receive,
    so that it grows with the imbalance of the experts.
    """

    part: str
    what: str
    bytes: float
    rows: bool = False


def saved_tensors(config: Config, layout: Layout, batch: Batch) -> list[Saved]:
    """All tensors that the backward pass of one micro-batch needs, without parameters and input images.

    With recomputation, recomputed tensors are not included; `transient` counts them.
    """
    model, b, recompute = config.model, zero_of(config).width, config.parallel.recompute
    depth, moe, separate = model.depth, len(model.moe_blocks), len(model.conditional_blocks)
    ends = _ends(model, batch, b, recompute in ("blocks", "all"))
    block_inputs = _times(depth, _block_input(model, batch, b))
    if recompute == "all":
        return [*ends, *block_inputs, *_times(moe, _routing_results(model, batch))]
    kept = [*ends, *_times(moe, _router(config, layout, batch, b)), *_times(depth, _residual(model, batch, b))]
    if recompute == "blocks":
        return [
            *kept,
            *block_inputs,
            *_times(depth, _input(model, batch, b)),
            *_times(moe, _scored(model, batch, b)),
        ]
    keeps_input = recompute == "moe" or _moe_keeps_input(model, b)
    return [
        *kept,
        *_times(depth, _attention_half(config, layout, batch, b)),
        *_times(depth - 1, _text_mlp(config, layout, batch, b)),
        *_times(depth - (0 if keeps_input else moe), _input(model, batch, b)),
        *_times(depth - moe - separate, _mlp(model, "MLP", model.mlp_width, batch.images * model.tokens, layout.tp, b)),
        *_times(separate, _conditional_mlp(model, layout, batch, b)),
        *_times(0 if recompute == "moe" else moe, _moe(config, layout, batch, b)),
    ]


def _times(count: int, lines: Iterator[Saved]) -> Iterator[Saved]:
    for line in lines:
        yield line._replace(bytes=line.bytes * count)


def _ends(model: ModelConfig, batch: Batch, b: int, recomputes_blocks: bool) -> Iterator[Saved]:
    """Embeddings, the final layer and the loss."""
    B, D = batch.images, model.hidden_size
    T, pixels = B * model.tokens, B * model.in_channels * model.input_size**2
    yield Saved("embeddings", "images, in the model's type", pixels * b)
    yield Saved("embeddings", "sinusoids, around the time MLP's SiLU", B * (TIME_SINUSOIDS + 2 * D) * b)
    yield Saved("embeddings", "condition", B * D * b)
    if model.has_text:
        yield Saved("embeddings", "text features", B * model.text_tokens * model.text_width * b)
        yield Saved("embeddings", "text, around the GELU", 2 * B * model.text_tokens * D * b)
    if model.positions == "rope":
        yield Saved("embeddings", "cosines and sines of positions", model.sequence * model.head_dim * 4)
    if model.modulation == "shared":
        yield Saved("adaLN", "SiLU of the condition", B * D * b)
        if recomputes_blocks:  # it is an input of each of them
            yield Saved("adaLN", "shared shifts, scales, gates", B * 6 * D * b)
    yield Saved("final layer", "input", B * model.sequence * D * b)
    yield Saved("final layer", "normalised, modulated", 2 * T * D * b)
    yield Saved("final layer", "SiLU, 1 + scale", 2 * B * D * b)
    yield Saved("loss", "difference", pixels * 4)
    if model.align_block:
        yield Saved("projector", "tokens, around both SiLUs", T * (D + 4 * model.align_hidden) * b)
        yield Saved("projector", "features of both sides, float32", 2 * T * model.align_width * 4)


def _residual(model: ModelConfig, batch: Batch, b: int) -> Iterator[Saved]:
    """Tensors that a block saves around its two halves, with and without recomputation."""
    B, D = batch.images, model.hidden_size
    yield Saved("residual", "the MLP's or MoE's output, under its gate", B * model.tokens * D * b)
    yield Saved("adaLN", "shifts, scales, gates", B * 6 * D * b)


def _block_input(model: ModelConfig, batch: Batch, b: int) -> Iterator[Saved]:
    """The input from which a block is recomputed."""
    yield Saved("residual", "block's input", batch.images * model.sequence * model.hidden_size * b)


def _input(model: ModelConfig, batch: Batch, b: int) -> Iterator[Saved]:
    yield Saved("residual", "the MLP's or MoE's input", batch.images * model.tokens * model.hidden_size * b)


def _scored(model: ModelConfig, batch: Batch, b: int) -> Iterator[Saved]:
    """The tokens that a router scores, if they are not the layer's input and no recomputed norm saves them.

    Some routers save the tokens, others a copy in float32 or, for their mean, none.
    """
    saves = model.router in (*PROMOE_ROUTERS, "diffmoe") or (b == 4 and model.router != "classification")
    if model.router_input == "unmodulated" and saves:
        yield Saved("router", "normalised tokens", batch.images * model.tokens * model.hidden_size * b)


def _moe_keeps_input(model: ModelConfig, b: int) -> bool:
    """Whether the input of an MoE layer is saved; else it is freed after the gather of rows and the router's copy."""
    if model.shared_experts or model.unconditional_experts:
        return True
    return model.router_input == "modulated" and (model.router in (*PROMOE_ROUTERS, "diffmoe") or b == 4)


def _attention_half(config: Config, layout: Layout, batch: Batch, b: int) -> Iterator[Saved]:
    """The attention half of a block."""
    model, tp = config.model, layout.tp
    B, D = batch.images, model.hidden_size
    T, A = B * model.tokens, B * model.sequence  # of images; of images and texts
    yield Saved("adaLN", "1 + scale of both halves", 2 * B * D * b)
    if model.modulation == "block":
        yield Saved("adaLN", "SiLU", B * D * b)
    yield Saved("norm1", "block's input, normalised, modulated", 3 * A * D * b)
    yield Saved("attention", "queries, keys, values", 3 * A * D / tp * b)
    if model.qk_norm == "layer":
        yield Saved("attention", "means and deviations", 4 * A * model.heads / tp * b)
    elif model.qk_norm == "rms":
        yield Saved("attention", "root mean squares", 2 * A * model.heads / tp * 4)
    if model.qk_norm != "none" or model.positions == "rope":
        yield Saved("attention", "normalised or rotated queries and keys", 2 * A * D / tp * b)
        yield Saved("attention", "weighted values, heads together again", A * D / tp * b)
    yield Saved("attention", "weighted values", A * D / tp * b)
    yield Saved("attention", "logarithms of the softmax's sums", A * model.heads / tp * 4)
    yield Saved("residual", "attention's output, under its gate", A * D * b)
    if model.has_text:
        yield Saved("attention", "mask", A * b)
    yield Saved("norm2", "tokens, normalised", 2 * T * D * b)
    if model.norm == "layer":
        yield Saved("norms", "means and deviations", 2 * (A + T) * b)
    else:
        yield Saved("norms", "root mean squares", (A + T) * 4)


def _text_mlp(config: Config, layout: Layout, batch: Batch, b: int) -> Iterator[Saved]:
    """The MLP of the text tokens of a block, with its norm and residual connection."""
    model, D = config.model, config.model.hidden_size
    rows = batch.images * model.text_tokens
    if not model.text_ffn:
        return
    yield Saved("text MLP", "tokens, normalised, modulated", 3 * rows * D * b)
    yield Saved("norms", "means and deviations", 2 * rows * b if model.norm == "layer" else rows * 4)
    yield from _mlp(model, "text MLP", model.text_ffn, rows, layout.tp, b)
    yield Saved("residual", "the text MLP's output, under its gate", rows * D * b)


def _mlp(model: ModelConfig, part: str, width: int, rows: float, tp: int, b: int) -> Iterator[Saved]:
    yield Saved(part, "before the activation", model.hidden_projections * rows * width / tp * b)
    yield Saved(part, "after the activation", rows * width / tp * b)


def _conditional_mlp(model: ModelConfig, layout: Layout, batch: Batch, b: int) -> Iterator[Saved]:
    """The experts of conditional and of null images without routed ones, and shared experts."""
    F, S, tp = model.moe_width, model.tokens, layout.tp
    if model.shared_experts:
        yield from _mlp(model, "shared expert", model.shared_experts * model.shared_width, batch.images * S, tp, b)
    yield from _mlp(model, "conditional expert", F, batch.conditional * S, tp, b)
    null = (batch.images - batch.conditional) * S
    yield from _mlp(model, "unconditional expert", model.unconditional_experts * F, null, tp, b)


def _moe(config: Config, layout: Layout, batch: Batch, b: int) -> Iterator[Saved]:
    """Shared, unconditional and routed experts with the dispatch; the input counts as part of norm2."""
    model, tp = config.model, layout.tp
    F, D = model.moe_width, model.hidden_size
    T = batch.images * model.tokens
    null = T - routed_images(model, batch) * model.tokens
    R = routed_rows(model, batch)  # rows of all ranks of a region, which divide the rows or split every expert
    local_rows, width = (R, F / layout.etp) if layout.etp > 1 else (R / tp, F)
    if model.shared_experts:
        yield from _mlp(model, "shared expert", model.shared_experts * model.shared_width, T, tp, b)
    if null:
        yield from _mlp(model, "unconditional expert", model.unconditional_experts * F, null, tp, b)
    yield Saved("routed experts", "rows", local_rows * D * b, rows=True)
    before = model.hidden_projections * local_rows * width * b
    yield Saved("routed experts", "before the activation", before, rows=True)
    yield Saved("routed experts", "after the activation", local_rows * width * b, rows=True)
    yield Saved("routed experts", "outputs, under their weights", local_rows * D * b)
    yield Saved("dispatch", "orders, tokens, experts", 6 * local_rows * INDEX)
    if _by_expert(model):
        yield Saved("dispatch", "weighted outputs, by index_add", local_rows * D * b)


def _by_expert(model: ModelConfig) -> bool:
    """Whether rows are ordered by expert, not by token."""
    return model.router in ("promoe_ec", "ec", *BATCH_CHOICE_ROUTERS)


def _router(config: Config, layout: Layout, batch: Batch, b: int) -> Iterator[Saved]:
    """Tensors of the router, which is not recomputed. Scores are float32; tokens are copied only if they are not."""
    model = config.model
    E, D, images = model.num_experts, model.hidden_size, routed_images(model, batch)
    T = images * model.tokens
    copy = T * D * 4 if b < 4 else 0
    R = routed_rows(model, batch)
    yield Saved("router", "chosen experts, tokens, weights", R * (3 * INDEX + 4))
    if model.router in PROMOE_ROUTERS:
        yield Saved("router", "lengths, scores", T * (1 + E) * 4)
        if model.rcl_weight:
            yield Saved("router", "float32 tokens, of which experts take", copy if model.router == "promoe_ec" else 0)
            yield _contrast(model, images if model.router == "promoe_ec" else 1)
    if model.router == "classification":
        yield Saved("router", "mean tokens, scores", images * (D + 3 * E) * 4)
    if model.router == "kmeans":
        yield Saved("router", "float32 tokens", copy)
        yield Saved("router", "lengths, scores", T * (2 + E) * 4)
    if model.router == "gmm":
        yield Saved("router", "float32 tokens", copy)
        yield Saved("router", "squares", T * (D if model.mixture_variance == "diagonal" else 1) * 4)
        yield Saved("router", "means, variances", (5 if copy else 2) * E * D * 4)
        yield Saved("router", "posteriors, densities", T * (2 if model.mixture_weight else 1) * E * 4)
    if model.router in GATE_ROUTERS or model.has_custom_router:  # a user's router counts as a gate
        yield Saved("router", "float32 tokens", copy)
        yield Saved("router", "scores", T * E * 4)
    if model.router == "race":
        yield Saved("router", "float32 tokens", copy)
        yield Saved("router", "float32 matrices", D * (D + E) * 4 if copy else 0)
        yield Saved("router", "hidden units, around the GELU", 2 * T * D * 4)
        yield Saved("router", "probabilities, choices", (2 if model.router_similarity_weight else 0) * T * E * 4)
    if model.router == "diffmoe":
        yield Saved("router", "capacity predictor, around its SiLU", 2 * T * D * b)
        yield Saved("router", "predictions, choices", 2 * T * E * 4)
    if model.balance_weight and model.router in BALANCED_ROUTERS:
        yield Saved("router", "balance loss", T * E * 4)


def _routing_results(model: ModelConfig, batch: Batch) -> Iterator[Saved]:
    """Cached routing results, which recomputation reuses. Source: nn/moe/routing_cache.py."""
    E, D, images = model.num_experts, model.hidden_size, routed_images(model, batch)
    if model.router in BATCH_CHOICE_ROUTERS:
        yield Saved("router", "mask of the tokens taken", images * model.tokens * E)
    else:
        rows = images if model.router == "classification" else routed_rows(model, batch)
        yield Saved("router", "chosen experts or tokens", rows * INDEX)
    if model.router == "kmeans":
        yield Saved("router", "centroids", E * D * 4)
    if model.router == "promoe" and model.rcl_weight:  # computed for all layers at once, outside of blocks
        yield _contrast(model, 1)


def _contrast(model: ModelConfig, groups: float) -> Saved:
    """Normalised prototypes and centroids, lengths, logits and weights, for each group of tokens."""
    E, D = model.num_experts, model.hidden_size
    return Saved("router", "contrastive loss, float64", groups * E * (2 * D + E + 3) * 8)


def transient(config: Config, layout: Layout, batch: Batch) -> float:
    """Bytes of temporary tensors in the backward pass: gradients around the largest half-block, and what it recomputes.

    Includes the gradient of the largest parameter before it is copied to its buffer. What the final layer saved is
    freed by then. The result is an upper bound, since other tensors that are freed in the meantime are not subtracted.
    """
    model, b, tp = config.model, zero_of(config).width, layout.tp
    D, T = model.hidden_size, batch.images * model.tokens
    R, moe = routed_rows(model, batch) / (1 if layout.etp > 1 else tp), len(model.moe_blocks)
    A = batch.images * model.sequence
    attention = (2 * A * D + 6 * A * D / tp) * b
    hidden = 2 if model.activation == "gelu" else 5  # gradients of hidden values, with their products in a SwiGLU
    dense = (2 * T * D + hidden * T * model.mlp_width / tp) * b
    router = 2 * routed_images(model, batch) * model.tokens * D * 4  # float32 tokens and their gradient
    rows = R * (2 * D + hidden * model.moe_width / layout.etp)
    shared = T * model.shared_experts * model.shared_width / tp
    attention_half = [*_attention_half(config, layout, batch, b), *_text_mlp(config, layout, batch, b)]
    halves = [(attention, [*attention_half, *_input(model, batch, b)])]
    if len(model.expert_blocks) < model.depth:
        halves.append((dense, list(_mlp(model, "MLP", model.mlp_width, T, tp, b))))
    if model.conditional_blocks:
        experts = list(_conditional_mlp(model, layout, batch, b))
        widths = model.shared_experts * model.shared_width + max(1, model.unconditional_experts) * model.moe_width
        halves.append(((4 * T * D + hidden * T * widths / tp) * b, experts))
    if moe:
        of_experts = list(_moe(config, layout, batch, b))
        freed = sum(line.bytes for line in of_experts)  # before the backward pass of the router
        halves.append((max((2 * T * D + rows + shared) * b, 2 * T * D * b + router - freed), of_experts))
    replicated, routed = tensors_on_rank(model, layout)
    policy = config.parallel.recompute
    sizes = [sum(line.bytes for line in lines) for _, lines in halves]
    recomputed = [
        sizes[i] if policy == "blocks" or (policy, i) == ("moe", len(sizes) - 1) else 0.0 for i in range(len(sizes))
    ]
    if policy == "all":  # both halves of a block and its router are recomputed together
        residual = sum(line.bytes for line in _residual(model, batch, b))
        recomputed = [0.0, *(sizes[0] + residual + size for size in sizes[1:])]
        recomputed[-1] += sum(line.bytes for line in _router(config, layout, batch, b)) if moe else 0.0
    widest = max(temporary + made for (temporary, _), made in zip(halves, recomputed, strict=True))
    # What the final layer and the loss saved is freed before the backward pass of the last block.
    ends = _ends(model, batch, b, policy in ("blocks", "all"))
    last = sum(line.bytes for line in ends if line.part in ("final layer", "loss"))
    return max(widest - last, 3 * T * D * b) + max(*replicated, *routed) * b
