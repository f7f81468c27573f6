"""Counts the parameters and floating-point operations of a model, and the bytes of its states on a rank. No torch.

Everything is derived from one table of the model's linear layers, `layers`. Letters: D hidden size, F expert width,
S tokens of an image, N tokens of a text, L blocks, E routed experts, K experts of a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megapromoe.config import extensions
from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.layout import Layout
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import Config
from megapromoe.planning.zero import consecutive_groups, largest_group, scatters_gradients

TIME_SINUSOIDS = 256
EXPERT_PARTS = ("routed experts", "shared expert", "conditional expert", "unconditional expert")
HIDDEN_PARTS = ("attention", "MLP", "text MLP", *EXPERT_PARTS)
EVEN = 2  # source: DeepSpeed 0.19.8, nccl_start_alignment_factor


@dataclass(frozen=True)
class Linear:
    """Equal linear layers: `copies` layers of inputs x outputs, which together process `rows` rows of an image.

    `split` is the dimension that tensor parallelism splits: "columns" (outputs, with the bias), "rows" (inputs; the
    bias is replicated) or None. Tables and norms are listed as layers with 0 rows. `stacked` weights are one parameter.
    """

    part: str
    inputs: int
    outputs: int
    copies: int
    rows: int
    bias: bool = True
    split: str | None = None
    stacked: int = 1

    @property
    def is_hidden(self) -> bool:
        """Whether the weight is a matrix between hidden activations, which Muon updates."""
        return self.part in HIDDEN_PARTS and self.inputs > 1

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs * self.outputs + self.bias * self.outputs)

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward pass of one image: 2 m n k for a product."""
        return 2 * self.rows * self.inputs * self.outputs

    def tensors(self, tp: int) -> list[int]:
        """Number of elements of the weight and of the bias of one copy, on one of the `tp` ranks that split it."""
        weight, bias = self.inputs * self.outputs, self.outputs
        if self.split is not None:
            weight //= tp
        if self.split == "columns":
            bias //= tp
        return [weight, bias] if self.bias else [weight]


def layers(model: ModelConfig) -> Iterator[Linear]:
    """All layers with trained parameters, with the number of rows of one image that each processes.

    Source: DiT (arXiv 2212.09748) and ProMoE (arXiv 2510.24711).
    """
    D, S, L, patch = model.hidden_size, model.tokens, model.depth, model.patch_size**2
    moe, with_experts = len(model.moe_blocks), len(model.expert_blocks)
    dense = L - with_experts

    yield Linear("patch embedding", model.in_channels * patch, D, 1, S)
    yield Linear("time embedding", TIME_SINUSOIDS, D, 1, 1)
    yield Linear("time embedding", D, D, 1, 1)
    N = model.text_tokens  # texts count with their largest number of tokens
    if model.has_text:
        yield Linear("text embedding", model.text_width, D, 1, N)
        yield Linear("text embedding", D, D, 1, N)
        yield Linear("text embedding", 1, D, 1, 0, bias=False)  # the vector of no text
        if model.text_ffn:
            yield from _mlp("text MLP", D, model.text_ffn, L - 1, (L - 1) * N, model.hidden_projections)
    else:
        yield Linear("class embedding", model.num_classes + 1, D, 1, 0, bias=False)
    if model.modulation == "shared":
        yield Linear("shared adaLN", D, 6 * D, 1, 1, split="columns")
        yield Linear("adaLN", 1, 6 * D, L, 0, bias=False)
    else:
        yield Linear("adaLN", D, 6 * D, L, L, split="columns")
    yield Linear("attention", D, 3 * D, L, L * (N + S), split="columns", stacked=3)
    yield Linear("attention", D, D, L, L * (N + S), split="rows")
    if model.qk_norm != "none":  # weight, and bias of LayerNorm, over a head's channels, for queries and for keys
        yield Linear("attention", 1, model.head_dim, 2 * L, 0, bias=model.qk_norm == "layer")
    hidden = model.hidden_projections
    yield from _mlp("MLP", D, model.mlp_width, dense, dense * S, hidden)
    if moe:
        F, E = model.moe_width, model.num_experts
        if model.has_custom_router:
            yield from _custom_router(model, moe)
        elif model.router == "classification":
            yield Linear("router", D, E, moe, moe)  # one row: the mean token of the image
        elif model.router == "gmm":  # means, variances and mixing weights
            yield Linear("router", D, E, moe, moe * S, bias=False)
            diagonal = model.mixture_variance == "diagonal"
            yield Linear("router", D if diagonal else 1, E, moe, moe * S if diagonal else 0, bias=False)
            yield Linear("router", 1, E, moe, 0, bias=False)
        elif model.router == "race":
            yield Linear("router", D, D, moe, moe * S)
            yield Linear("router", D, E, moe, moe * S)
        else:  # prototypes or gate; the centroids of k-means are not parameters
            yield Linear("router", D, E, 0 if model.router == "kmeans" else moe, moe * S, bias=False)
        if model.router == "diffmoe":
            yield Linear("capacity predictor", D, D, moe, moe * S)
            yield Linear("capacity predictor", D, E, moe, moe * S)
        yield from _mlp("routed experts", D, F, moe * E, moe * model.rows_per_image, hidden)
    if separate := len(model.conditional_blocks):
        yield from _mlp("conditional expert", D, model.moe_width, separate, separate * S, hidden)
    if shared := with_experts * model.shared_experts:
        yield from _mlp("shared expert", D, model.shared_width, shared, shared * S, hidden)
    if unconditional := with_experts * model.unconditional_experts:
        yield from _mlp("unconditional expert", D, model.moe_width, unconditional, 0, hidden)
    if model.align_block:
        hidden = model.align_hidden
        for inputs, outputs in ((D, hidden), (hidden, hidden), (hidden, model.align_width)):
            yield Linear("projector", inputs, outputs, 1, S)
    yield Linear("final layer", D, 2 * D, 1, 1)
    yield Linear("final layer", D, patch * model.out_channels, 1, S)


def _custom_router(model: ModelConfig, moe: int) -> Iterator[Linear]:
    """The layers of a user's router, which its class describes for one MoE layer."""
    for layer in extensions.ROUTER.load(model.router).planned_layers(model):
        yield replace(layer, part="router", copies=layer.copies * moe, rows=layer.rows * moe)


def _mlp(part: str, D: int, width: int, copies: int, rows: int, hidden: int) -> Iterator[Linear]:
    """MLPs with `hidden` projections to the hidden width, of which one is a gate if there are two."""
    yield Linear(part, D, hidden * width, copies, rows, split="columns", stacked=hidden)
    yield Linear(part, width, D, copies, rows, split="rows")


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `by_part` sums to `total`.

    `total` is the number that all commands show as the model's parameters. It includes the constant table of positions.
    `trainable` excludes this table, which has no optimizer state.

    `active` counts the parameters that process a token of a labelled image: all prototypes, and of the routed experts
    only those to which the token is assigned (under expert choice on average), without the unconditional expert.
    """

    total: int
    trainable: int
    active: int
    by_part: dict[str, int]

    @property
    def in_words(self) -> str:
        """The three counts in a sentence, with the difference between the total and the trained ones."""
        counts = f"{self.total:,} parameters, {self.active:,} active"
        if self.total == self.trainable:
            return f"{counts}; all are trained"
        others = f"{self.total - self.trainable:,} are the constant table of positions"
        return f"{counts}; {self.trainable:,} trained, the other {others}"


def parameters(model: ModelConfig) -> Parameters:
    """Counts the parameters of a model exactly."""
    by_part: dict[str, int] = {"positions": model.position_constants}
    for layer in layers(model):
        by_part[layer.part] = by_part.get(layer.part, 0) + layer.parameters
    total = sum(by_part.values())
    unvisited = by_part.get("routed experts", 0) * (model.num_experts - model.top_k) // model.num_experts
    active = total - unvisited - by_part.get("unconditional expert", 0)
    return Parameters(total, total - by_part["positions"], active, by_part)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image; `by_part` sums to `forward`."""

    forward: int
    training: int
    by_part: dict[str, int]


def flops_per_image(model: ModelConfig) -> Flops:
    """Counts the operations of matrix products, 2 m n k each, including attention's scores and weighted values.

    All images count as labelled: null images, whose tokens use the unconditional expert instead of K routed ones, are
    ignored. DiffMoE counts as if it chose within each image. A training step counts as three forward passes, since the
    gradients of inputs and of weights cost one each. Recomputation is not counted, because it is not useful work.
    """
    by_part: dict[str, int] = {}
    for layer in layers(model):
        if layer.rows:
            by_part[layer.part] = by_part.get(layer.part, 0) + layer.flops
    if model.has_text:  # the mean of a text's tokens
        by_part["text embedding"] += 2 * model.text_tokens * model.hidden_size
    by_part["attention"] += 2 * 2 * model.sequence**2 * model.hidden_size * model.depth
    forward = sum(by_part.values())
    return Flops(forward, 3 * forward, by_part)


@dataclass(frozen=True)
class Memory:
    """Bytes of the states on one rank. `host` bytes of them are in host memory, the others on the device."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    host: int

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema - self.host


def memory_per_rank(config: Config, world: int) -> Memory:
    """Bytes of parameters, gradients, the optimizer's states and EMA on the first rank, which holds the most.

    The result is exact and includes ZeRO's padding. Activations and communication buffers are not included; see
    `planning.memory`. ZeRO partitions the optimizer's states and the EMA from stage 1, the gradients from stage 2 and
    the parameters at stage 3, over the data-parallel ranks, or for routed experts over the expert-data-parallel ranks;
    with `parallel.shard_ranks` over some of them.
    Where gradients are reduce-scattered, stage 1 too keeps only a shard of them, unless it sums micro-batches.
    AdamW keeps two fp32 moments, Muon one, and both an fp32 master copy; plain fp32 training (stage 0) needs no master
    copy. The EMA is fp32, one for each of `train.ema_decay`.

    Raises ConfigError where a size of the layout does not divide, or the DeepSpeed file is wrong.
    """
    layout, deepspeed = config.layout(world), load_deepspeed(config)
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    bf16 = deepspeed.get("bf16", {}).get("enabled", False)
    groups = optimizer_groups(config, layout)
    unsharded = sum(sum(group.tensors) for group in groups)
    if stage == 3:  # every tensor is partitioned separately
        shards = [sum(-(-n // group.ranks) for n in group.tensors) for group in groups]
    else:  # flat groups of tensors are partitioned
        shards = [group.shard for group in groups]
    shard = sum(shards)
    held = unsharded if stage == 0 else shard
    summed_at_once = scatters_gradients(config) and config.train.accumulation == 1
    width = 2 if bf16 else 4
    master = 0 if stage == 0 and not bf16 else 4
    optimizer = sum(
        (sum(group.tensors) if stage == 0 else part) * (master + (4 if group.uses_muon else 8))
        for group, part in zip(groups, shards, strict=True)
    )
    ema = held * 4 * len(config.train.ema_decays)
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Memory(
        parameters=width * (shard if stage == 3 else unsharded),
        gradients=width * (shard if stage >= 2 or summed_at_once else unsharded),
        optimizer=optimizer,
        ema=ema,
        host=optimizer + ema if offloaded else 0,
    )


@dataclass(frozen=True)
class HiddenMatrices:
    """`count` equal matrices on the first rank, of `rows` outputs and `columns` inputs, which Muon orthogonalises.

    `ranks` is the number of ranks over which ZeRO divides them; `routed`: whether they are of routed experts.
    """

    count: int
    rows: int
    columns: int
    ranks: int
    routed: bool

    @property
    def flops(self) -> int:
        """Operations of one Newton-Schulz step of all of them: x·xᵀ, its square, and their product with x."""
        small, large = sorted((self.rows, self.columns))
        return self.count * (4 * small**2 * large + 2 * small**3)


def hidden_matrices(model: ModelConfig, layout: Layout) -> Iterator[HiddenMatrices]:
    """The matrices that Muon updates, of the replicated parameters and of the experts of the first rank."""
    for layer in layers(model):
        if layer.is_hidden:
            copies, ranks, routed = layer.copies * layer.stacked, layout.dp_shard, layer.part == "routed experts"
            if routed:
                of_expert = copies // (model.num_experts * len(model.moe_blocks))
                copies, ranks = of_expert * sum(layout.expert_slots(model)), layout.edp_shard
            yield HiddenMatrices(copies, layer.outputs // layer.stacked, layer.inputs, ranks, routed)


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters on the first rank that the optimizer updates together.

    Attributes:
        tensors: number of elements of each.
        ranks: over which ZeRO divides them.
        routed: whether they are of routed experts.
        uses_muon: whether Muon updates them.
        replicas: number of ranks that have the same part at ZeRO stages 1 and 2.
    """

    tensors: list[int]
    ranks: int
    routed: bool
    uses_muon: bool = False
    replicas: int = 1

    @property
    def shard(self) -> int:
        """Elements of a rank's part, which ZeRO 1 and 2 pad to equal, even parts."""
        return -(-sum(self.tensors) // (EVEN * self.ranks)) * EVEN


@lru_cache(maxsize=256)  # the search asks for those of each layout six times
def optimizer_groups(config: Config, layout: Layout) -> tuple[OptimizerGroup, ...]:
    """The parameter groups of the optimizer on the first rank; those of Muon are separate from those of AdamW.

    Source: engine/deepspeed_backend/start.py. The order of parameters is that of `tensors_on_rank`.
    """
    groups = []
    sizes = ((False, layout.dp, layout.dp_shard), (True, layout.edp, layout.edp_shard))
    for uses_muon in (False, True) if config.train.optimizer == "muon" else (None,):
        kinds = tensors_on_rank(config.model, layout, hidden=uses_muon)
        for (routed, ranks, shards), tensors in zip(sizes, kinds, strict=True):
            for numbers in consecutive_groups(tensors, largest_group(config, routed, ranks)):
                part = tensors[numbers.start : numbers.stop]
                groups.append(OptimizerGroup(part, shards, routed, bool(uses_muon), ranks // shards))
    return tuple(groups)


OUTSIDE = -1  # the block of parameters that belong to none


def tensors_on_rank(model: ModelConfig, layout: Layout, hidden: bool | None = None) -> tuple[list[int], list[int]]:
    """Number of elements of each parameter on the first rank: (replicated or tp-split ones, those of routed experts).

    First those outside of blocks, then those of each block, the largest first. Each weight and bias of a block's
    routed experts is one tensor with the slots of a rank.

    Args:
        hidden: only hidden matrices, or only all other parameters; None: all.
    """
    replicated, routed = _tensors(model, layout.tp, layout.etp, layout.expert_slots(model), hidden)
    return list(replicated), list(routed)


@lru_cache(maxsize=512)
def _tensors(
    model: ModelConfig, tp: int, etp: int, expert_slots: tuple[int, ...], hidden: bool | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    slots = dict(zip(model.moe_blocks, expert_slots, strict=True))
    replicated: dict[int, list[int]] = {block: [] for block in range(OUTSIDE, model.depth)}
    routed: dict[int, list[int]] = {block: [] for block in range(OUTSIDE, model.depth)}
    for layer in layers(model):
        is_routed = layer.part == "routed experts"
        tensors = layer.tensors(etp if is_routed else tp)
        if hidden is not None:
            weights = 1 if layer.is_hidden else 0
            tensors = tensors[:weights] if hidden else tensors[weights:]
        blocks = _blocks_of(model, layer.part)
        for block in blocks:
            if is_routed:
                routed[block] += [slots[block] * n for n in tensors]
            else:
                replicated[block] += tensors * (layer.copies // len(blocks))
    in_order = [[n for block in kind.values() for n in sorted(block, reverse=True)] for kind in (replicated, routed)]
    return tuple(in_order[0]), tuple(in_order[1])


def expert_elements(model: ModelConfig, etp: int) -> int:
    """Elements of one routed expert of a block on a rank, of `etp` over which it is split."""
    return sum(sum(layer.tensors(etp)) for layer in layers(model) if layer.part == "routed experts")


def _blocks_of(model: ModelConfig, part: str) -> Sequence[int]:
    """The blocks that have a part, each equally many of its layers; `OUTSIDE` for a part outside of blocks."""
    every = range(model.depth)
    if part in ("adaLN", "attention"):
        return every
    if part == "text MLP":
        return every[:-1]
    if part == "MLP":
        of_experts = set(model.expert_blocks)
        return [block for block in every if block not in of_experts]
    if part in ("conditional expert", "shared expert", "unconditional expert"):
        return model.expert_blocks
    if part in ("router", "capacity predictor", "routed experts"):
        return model.moe_blocks
    return (OUTSIDE,)
