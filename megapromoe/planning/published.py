"""The published times of a step on 4 A800 beside a plan, and what explains the difference.

Source: Wei et al., "Routing Matters in MoE", arXiv 2510.24711, table 14: GPU-hours on 4 A800 for 500,000 steps of 256
images. The code is that of github.com/ali-vilab/ProMoE, commit 5915b31: DistributedDataParallel, autocast to bf16 over
fp32 weights, AdamW and averages of all parameters on every GPU, and a loop over experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from megapromoe.config.resolve import resolve
from megapromoe.planning.cost import parameters
from megapromoe.planning.machines import Assumptions, Machine
from megapromoe.planning.roofline import step_time
from megapromoe.planning.search import Plan

GPU_HOURS = {"dit_l": 166.67, "tc_l_e8": 333.33, "ec_l_e8": 277.78, "diffmoe_l_e8": 333.33, "promoe_l": 333.33}
STEPS, IMAGES, GPUS = 500_000, 256, 4
# Bytes for each parameter and step in the published code, all fp32: AdamW reads the gradient and reads and writes
# weight and moments (28); the norm reads the gradients and the clipping reads and writes them (12); `mul_` and `add_`
# of the average (8 + 12); autocast reads fp32 weights and writes bf16 ones (6).
STATE_BYTES = 28 + 12 + 20 + 6
# Passes over a gradient of the size of all tokens for each `x[indices]`: zeros are written, and the sum with the
# gradient so far reads two tensors and writes one. The tokens are fp32, because autocast computes LayerNorm in fp32.
INDEX_PASSES, TOKEN_BYTES = 4, 4
# Operators of one expert, forward and backward, and of one cluster of the contrastive loss; counted in the source.
EXPERT_OPERATORS, CLUSTER_OPERATORS = 48, 20
# Reads of the host in an MoE layer: one `torch.where` for each expert, two reads for each cluster, and six others.
WAITS_OF_EXPERT, WAITS_OF_CLUSTER, OTHER_WAITS = 1, 2, 6


def seconds(preset: str) -> float:
    """The published seconds of a step. Raises KeyError for a preset without one."""
    return GPU_HOURS[preset] * 3600 / STEPS / GPUS


def applies(preset: str | None, plan: Plan, machine: Machine) -> bool:
    """Whether a plan is of a published model on the published GPUs."""
    batch = plan.config.train.global_batch
    return preset in GPU_HOURS and machine.name == "A800 80GB SXM" and (plan.layout.world, batch) == (GPUS, IMAGES)


def published_lines(preset: str, plan: Plan, machine: Machine, assume: Assumptions) -> Iterator[str]:
    """The published time beside that of the plan; for ProMoE, what the published code does besides, in milliseconds."""
    published, planned = seconds(preset), plan.time.total
    yield (
        f"published: {1e3 * published:.0f} ms a step ({GPU_HOURS[preset]} GPU-hours for {STEPS:,} steps on {GPUS} A800;"
        f" arXiv 2510.24711, table 14), {published / planned:.2f} times this plan"
    )
    if preset != "promoe_l":
        return
    dense = resolve("dit_l")
    dense_time = step_time(dense, dense.layout(GPUS), machine, assume).total
    factor = seconds("dit_l") / dense_time
    yield (
        f"  dense DiT-L: {1e3 * seconds('dit_l'):.0f} ms published, {1e3 * dense_time:.0f} ms planned, a factor of"
        f" {factor:.2f} with no expert; with it this plan takes {1e3 * factor * planned:.0f} ms"
    )
    yield (
        f"  the other {1e3 * (published - factor * planned):.0f} ms, by the source of the published code and at the"
        " rates of this plan:"
    )
    for milliseconds, words in explanation(plan, machine, assume):
        yield f"  {milliseconds:5.0f} ms  {words}"
    total = sum(milliseconds for milliseconds, _ in explanation(plan, machine, assume))
    yield (
        f"  {1e3 * (published - factor * planned) - total:5.0f} ms  remain. Not estimated: the queue of the GPU runs"
        f" empty at {host_waits(plan):,} reads of the host in a forward pass"
    )
    yield (
        "  The published configuration of this model also encodes images within the step (use_pre_latents: False); that"
        " of the dense one reads latents. The paper does not state which was timed"
    )


def explanation(plan: Plan, machine: Machine, assume: Assumptions) -> list[tuple[float, str]]:
    """Milliseconds that the published code takes for ProMoE and not for the dense model, with the reason."""
    model = plan.config.model
    more = parameters(model).trainable - parameters(resolve("dit_l").model).trainable
    memory, links = machine.hbm * assume.memory, machine.nvlink * assume.links
    experts, clusters, blocks = model.num_experts + 1, model.num_experts, len(model.moe_blocks)
    tokens = plan.config.train.global_batch // GPUS * model.tokens
    gradient = tokens * model.hidden_size * TOKEN_BYTES
    indexed = INDEX_PASSES * gradient * (experts + clusters) * blocks
    operators = blocks * (experts * EXPERT_OPERATORS + clusters * CLUSTER_OPERATORS)
    return [
        (
            1e3 * indexed / memory,
            f"gradients of all tokens for each of {experts} experts and {clusters} clusters in {blocks} layers:"
            f" {INDEX_PASSES} passes over {gradient / 1e6:.0f} MB",
        ),
        (
            1e3 * operators * assume.launch,
            f"launches of about {operators:,} more operators; in the forward pass the host waits for the GPU between"
            " them, so few of them overlap",
        ),
        (
            1e3 * more * STATE_BYTES / memory,
            f"fp32 weights, gradients, moments and averages of {more / 1e6:,.0f} M more parameters on every GPU:"
            f" {STATE_BYTES} bytes each",
        ),
        (
            1e3 * more * 4 * 2 * (GPUS - 1) / GPUS / links,
            "their fp32 gradients in DDP's all-reduce; less where it overlaps with the backward pass",
        ),
    ]


def host_waits(plan: Plan) -> int:
    """Reads of the host in a forward pass of the published code."""
    model = plan.config.model
    per_layer = (model.num_experts + 1) * WAITS_OF_EXPERT + model.num_experts * WAITS_OF_CLUSTER + OTHER_WAITS
    return len(model.moe_blocks) * per_layer
