"""Lists all collectives of one optimizer step, as this package and DeepSpeed call them.

`collectives` lists them for a layout. `payload` is the size of a rank's input to a call (for a gather, of its output);
`wire` is the minimum that the rank sends. Groups of one rank are left out, because they send nothing.

Letters as in `cost.py`; b is the size of an activation in bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from megapromoe.config.layout import Layout
from megapromoe.config.model_options import BALANCED_ROUTERS, ModelConfig
from megapromoe.config.options import Config
from megapromoe.planning.cost import expert_elements, hidden_matrices, layers, optimizer_groups, tensors_on_rank
from megapromoe.planning.zero import Zero, scatters_gradients, zero_of

MOE = ("shared expert", "unconditional expert", "routed experts")
BLOCKS = ("adaLN", "attention", "text MLP", "MLP", "conditional expert", *MOE)
# Parts of `cost.layers` that are recomputed in the backward pass, for each value of `parallel.recompute`.
RECOMPUTED_PARTS = {"none": (), "moe": MOE, "blocks": BLOCKS, "all": (*BLOCKS, "router", "capacity predictor")}


@dataclass(frozen=True)
class Collective:
    """`count` equal calls of `op` over the group `over` of `size` ranks, a direction of `distributed.mesh.rank_tables`.

    `payload` is in bytes for each call, a mean if the calls differ. `phase` is "forward", "backward", "gradients"
    (during or after the backward pass) or "update". `ours` is true for calls of this package, false for those of
    DeepSpeed. `leaves`: nothing of the payload of an all-to-all is for the rank itself; otherwise 1/size of it is.
    """

    what: str
    op: str
    over: str
    size: int
    count: int
    payload: float
    phase: str
    ours: bool = True
    leaves: bool = False

    @property
    def wire(self) -> float:
        """Bytes that a rank sends in all calls together, with the optimal algorithm for each op."""
        share = 1 if self.leaves else (self.size - 1) / self.size
        return self.count * self.payload * share * (2 if self.op == "all_reduce" else 1)


@dataclass(frozen=True)
class Batch:
    """Images of one rank's micro-batch. `conditional` counts those that are not null; in a plan it is a mean."""

    images: int
    conditional: float


def expected_batch(config: Config, layout: Layout) -> Batch:
    """The mean micro-batch, in which a share `data.condition_dropout` of the images is null."""
    return Batch(layout.micro_batch, layout.micro_batch * (1 - config.data.condition_dropout))


def has_unconditional(model: ModelConfig) -> bool:
    return model.unconditional_experts > 0


def routed_images(model: ModelConfig, batch: Batch) -> float:
    """Number of images whose tokens are routed: all of them if there is no unconditional expert."""
    return batch.conditional if has_unconditional(model) else batch.images


def routed_rows(model: ModelConfig, batch: Batch) -> float:
    """Rows that the tokens of one data-parallel rank send to routed experts in an MoE layer; for DiffMoE the mean."""
    return routed_images(model, batch) * model.rows_per_image


def collectives(config: Config, layout: Layout, batch: Batch | None = None) -> tuple[Collective, ...]:
    """All collectives of one optimizer step on one rank, without groups of one rank and without the logging of metrics.

    Args:
        batch: images of each micro-batch; None: the expected batch.
    """
    batch = batch or expected_batch(config, layout)
    all_collectives = [
        *_blocks(config, layout, batch),
        *_norm(config, layout),
        *_zero(config, layout),
        *_cut_matrices(config, layout),
    ]
    return tuple(c for c in all_collectives if c.size > 1 and c.count)


def _blocks(config: Config, layout: Layout, batch: Batch) -> Iterator[Collective]:
    """Collectives of forward and backward pass.

    Source: nn/tensor_parallel.py, nn/moe/dispatcher.py, nn/moe/replicas.py, nn/layers.py.
    """
    model, b = config.model, zero_of(config).width
    B, D, L, moe = batch.images, model.hidden_size, model.depth, len(model.moe_blocks)
    T, R, tp, ep = B * model.tokens, routed_rows(model, batch), layout.tp, layout.ep
    micro = config.train.accumulation
    parts = RECOMPUTED_PARTS[config.parallel.recompute]
    again, again_moe = 1 + ("attention" in parts), 1 + ("routed experts" in parts)  # forward passes
    again_sum = 1 + (config.parallel.recompute == "all")

    def tensor(what: str, op: str, layers: int, payload: float, phase: str) -> Collective:
        return Collective(what, op, "tp", tp, micro * layers, payload, phase)

    # With recomputation the attention half runs its forward pass twice. An MLP or MoE is recomputed up to its final sum
    # over tp; the sum is repeated too if the output, which the residual gate needs, is not saved.
    modulations, repeated = (1, 1) if model.modulation == "shared" else (L, again)  # a shared one is not recomputed
    yield tensor("adaLN: join slices", "all_gather", modulations * repeated, B * 6 * D * b, "forward")
    yield tensor("adaLN: gradient of the condition", "all_reduce", modulations, B * D * b, "backward")
    attended = B * model.sequence * D * b
    yield tensor("attention: sum of heads", "all_reduce", L * again, attended, "forward")
    yield tensor("attention: gradient of its input", "all_reduce", L, attended, "backward")
    if model.text_ffn:
        text = B * model.text_tokens * D * b
        yield tensor("text MLP: sum of parts", "all_reduce", (L - 1) * again, text, "forward")
        yield tensor("text MLP: gradient of its input", "all_reduce", L - 1, text, "backward")
    if model.qk_norm != "none":  # weight, and bias of LayerNorm, of queries and keys
        tensors = 4 if model.qk_norm == "layer" else 2
        yield tensor("qk_norm: gradients", "all_reduce", tensors * L, model.head_dim * b, "backward")
    yield tensor("MLP or MoE: sum of parts", "all_reduce", L * again_sum, T * D * b, "forward")
    yield tensor("MLP or MoE: gradient of its input", "all_reduce", L, T * D * b, "backward")
    if not moe:
        return
    yield tensor("MoE: gradient of the rows' weights", "all_reduce", moe, R * 4, "backward")
    mean_slots = mean(layout.expert_slots(model))
    if layout.etp > 1:
        yield tensor("experts: gradient of the last bias", "all_reduce", moe, mean_slots * D * b, "backward")

    local_rows = (
        R if layout.etp > 1 else R / tp
    )  # rows of one rank: the ranks of a region divide the rows, or split the experts
    num_slots, rows_sent = ep * mean(layout.dispatch_slots(model)), local_rows
    if model.capacity_factor:  # a fixed number of slots, see nn/moe/capacity_dispatcher.py
        max_rows = -(-T // (1 if layout.etp > 1 else tp)) * model.top_k
        rows_sent = num_slots * max(1, math.ceil(model.capacity_factor * max_rows / model.num_experts))
    for what, payload, forward, backward in (
        ("dispatch: counts", num_slots * 8, 0 if model.capacity_factor else 1, 0),
        ("dispatch: rows to experts", rows_sent * D * b, 1, 1),
        ("combine: rows to sources", rows_sent * D * b, 1, 1),
    ):
        yield Collective(what, "all_to_all", "ep", ep, micro * moe * forward * again_moe, payload, "forward")
        yield Collective(what, "all_to_all", "ep", ep, micro * moe * backward, payload, "backward")
    if copied := [copies for _, copies in layout.replicas if copies]:
        payload = mean(copied) / ep * expert_elements(model, layout.etp) * b
        calls = micro * len(copied)
        for what, count, phase in (("weights", calls * again_moe, "forward"), ("gradients", calls, "backward")):
            yield Collective(f"replicas: {what}", "all_to_all", "ep", ep, count, payload, phase, leaves=True)
    yield from _statistics(model, layout.dp, batch, micro * moe)


def _statistics(model: ModelConfig, dp: int, batch: Batch, layers: int) -> Iterator[Collective]:
    """Collectives of routers for batch statistics, never recomputed. Source: nn/moe/routers.py, routing_cache.py."""
    if model.batch_scope != "global":
        if model.router == "race":  # each rank has a race of its own, and all have one threshold
            yield Collective("race: threshold", "all_reduce", "dp", dp, layers, 4, "forward")
        return
    E, D = model.num_experts, model.hidden_size

    def statistic(
        what: str, payload: float, backward: bool = True, op: str = "all_reduce", calls: int = layers
    ) -> Iterator[Collective]:
        yield Collective(what, op, "dp", dp, calls, payload, "forward")
        if backward:
            yield Collective(what, op, "dp", dp, calls, payload, "backward")

    if model.router == "promoe" and model.rcl_weight:  # one call for all layers
        moe = len(model.moe_blocks)
        yield from statistic("RCL: sums of tokens and counts", moe * E * (D + 1) * 4, calls=layers // moe)
    if model.router == "promoe_ec" and model.rcl_weight:
        yield from statistic("RCL: mean over images", 2 * 4)
    if model.router == "classification" and model.classification_weight:
        yield from statistic("classification: mean over images", 2 * 4)
    if model.router == "kmeans":
        yield from statistic("k-means: sums and counts", E * (D + 1) * 4, backward=False)
        yield from statistic("k-means: the farthest token", dp * (D + 1) * 4, backward=False, op="all_gather")
    if model.router == "gmm" and model.mixture_weight:
        yield from statistic("mixture: mean over images", 2 * 4)
    if model.router in BALANCED_ROUTERS and model.balance_weight:
        width = 2 * E + 1 if model.balance_form == "batch" else 2
        yield from statistic("balance loss", width * 4)
    if model.router == "race":
        moe = len(model.moe_blocks)
        scores = dp * batch.images * model.tokens * E * 4
        yield from statistic("race: scores of all ranks", scores, backward=False, op="all_gather")
        if model.router_similarity_weight:
            yield from statistic("race: similarity of experts", moe * 2 * E * E * 4, calls=layers // moe)
    if model.router == "diffmoe":
        scores = dp * batch.images * model.tokens * E * 4
        yield from statistic("DiffMoE: scores of all ranks", scores, backward=False, op="all_gather")
        yield from statistic("DiffMoE: thresholds", E * 4, backward=False)


def _norm(config: Config, layout: Layout) -> Iterator[Collective]:
    """Source: engine/engine.py, `_reduce_gradient_norm`: the squared norm and the votes to stop, float64.

    With Muon also the squared norm of AdamW's part, and with balance biases the load of each expert of each layer.
    """
    model = config.model
    payload = 24 if config.train.optimizer == "muon" else 16
    if model.balance_bias:
        payload += 8 * model.num_experts * len(model.moe_blocks)
    yield Collective("gradient norm", "all_reduce", "world", layout.world, 1, payload, "update")


def _cut_matrices(config: Config, layout: Layout) -> Iterator[Collective]:
    """Muon's matrices that ZeRO divides: to their owners, and the results back. Source: engine/matrix_exchange.py.

    Where the borders of partitions are within matrices is not known here: a border is taken to cut a matrix in the
    middle. At stage 3 each matrix counts as divided over all ranks.
    """
    zero = zero_of(config)
    if config.train.optimizer != "muon" or not zero.stage:
        return
    for group in optimizer_groups(config, layout):
        if not group.uses_muon or group.ranks == 1:
            continue
        matrices = [m for m in hidden_matrices(config.model, layout) if m.routed == group.routed]
        size = sum(m.count * m.rows * m.columns for m in matrices) / sum(m.count for m in matrices)
        total, ranks = sum(group.tensors), group.ranks
        shard = total / ranks
        share = size / (2 * shard) if shard >= size else 1 - shard / (2 * size)
        moved = total * (share if zero.stage < 3 else 1 - 1 / ranks)
        over = _divided_over(layout, group.routed)
        yield Collective("Muon: cut matrices", "all_to_all", over, ranks, 2, moved / ranks * zero.width, "update")


def _zero(config: Config, layout: Layout) -> Iterator[Collective]:
    """Collectives of gradients and parameters, of DeepSpeed 0.19.8 or of engine/deepspeed_backend/scatter.py.

    Stages 1 and 2 reduce-scatter each parameter group, or all-reduce buckets of gradients as stage 0 does
    (`train.gradient_reduction`), and gather the updated parameters. If states are divided over some of the ranks
    (`parallel.shard_ranks`), scatter and gather are over these, and shards are all-reduced over their replicas.
    Stages 2 and 3 reduce gradients in each micro-batch. Stage 3 gathers a large parameter for the forward pass, and
    again for the backward pass unless it is still in use from the forward pass; it gathers small parameters after the
    update. Bytes are exact, except that this reuse is counted in elements instead of modules. The number of gradient
    calls is exact if one bucket holds all gradients; otherwise DeepSpeed mixes whole gradients of both kinds in a
    bucket.
    """
    zero, micro = zero_of(config), config.train.accumulation
    stage, width = zero.stage, zero.width
    often = micro if stage >= 2 else 1
    replicated, routed = tensors_on_rank(config.model, layout)
    kinds = (("gradients", layout.dp_shard, replicated), ("expert gradients", layout.edp_shard, routed))
    for what, size, tensors in kinds:
        if not tensors:
            continue
        names, is_routed = (what, what.replace("gradients", "parameters")), tensors is routed
        over = _divided_over(layout, is_routed)
        groups = [g for g in optimizer_groups(config, layout) if stage in (1, 2) and g.routed == is_routed]
        if scatters_gradients(config):
            for group in groups:
                packed = group.shard * size * zero.message_width
                yield Collective(names[0], "reduce_scatter", over, size, often, packed, "gradients")
                shard, replicas = group.shard * zero.message_width, "edp_replicas" if is_routed else "dp_replicas"
                yield Collective(f"{what} of shards", "all_reduce", replicas, group.replicas, 1, shard, "gradients")
        elif stage < 3:
            calls = -(-sum(tensors) // zero.bucket)
            payload = sum(tensors) * (zero.message_width if stage else width) / calls
            yield Collective(names[0], "all_reduce", over, size, often * calls, payload, "gradients", False)
        else:
            padded = [-(-n // size) * size for n in tensors]
            calls = -(-sum(padded) // zero.bucket)
            payload = sum(padded) * width / calls
            yield Collective(names[0], "reduce_scatter", over, size, often * calls, payload, "gradients", False)
            twice = _recomputed_parameters(config, layout, is_routed)
            yield from _gathers(names[1], over, size, padded, twice, zero, micro)
        for group in groups:
            yield Collective(names[1], "all_gather", over, size, 1, group.shard * size * width, "update", False)


def _divided_over(layout: Layout, routed: bool) -> str:
    """The direction over which ZeRO divides the states of routed experts, or of all other parameters."""
    return ("edp" if routed else "dp") + ("_shard" if layout.shard_ranks else "")


def _gathers(
    what: str, over: str, size: int, tensors: list[int], recomputed: list[int], zero: Zero, micro: int
) -> Iterator[Collective]:
    small, large = [n for n in tensors if n <= zero.small], [n for n in tensors if n > zero.small]
    if small:
        payload = sum(small) * zero.width / len(small)
        yield Collective(what, "all_gather", over, size, len(small), payload, "update", False)
    if large:
        share = max(0.0, 1 - zero.kept / sum(large))  # share of the parameters that must be gathered again
        for phase, needed, part in (
            ("forward", large, 1.0),
            ("backward", large, share),
            ("backward", recomputed, share),
        ):
            needed = [n for n in needed if n > zero.small]
            count = round(len(needed) * part)
            if count:
                payload = sum(needed) * part * zero.width / count
                yield Collective(what, "all_gather", over, size, micro * count, payload, phase, False)


def _recomputed_parameters(config: Config, layout: Layout, routed: bool) -> list[int]:
    """Elements of the parameters that recomputation uses; without an MLP's last layer if its output is saved."""
    model, elements, recompute = config.model, [], config.parallel.recompute
    parts = RECOMPUTED_PARTS[recompute]
    for layer in layers(model):
        if layer.part not in parts or routed != (layer.part == "routed experts"):
            continue
        if routed:
            elements += [slots * n for slots in layout.expert_slots(model) for n in layer.tensors(layout.etp)]
        elif recompute == "all" or (layer.part, layer.split) != ("MLP", "rows"):
            elements += layer.tensors(layout.tp) * layer.copies
    return elements
