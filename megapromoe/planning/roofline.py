"""Estimates the time of a training step with a roofline model.

Each kernel takes the larger of its arithmetic time and its memory time. The time of the host and of the links is added.
`machines.Assumptions` holds all assumptions. Letters as in `cost.py`; b is the size of an activation in bytes.
"""

import math
from dataclasses import dataclass, replace
from statistics import mean

from megapromoe.config.layout import Layout
from megapromoe.config.options import Config
from megapromoe.planning.activations import saved_tensors
from megapromoe.planning.cost import (
    Linear,
    flops_per_image,
    hidden_matrices,
    layers,
    memory_per_rank,
    optimizer_groups,
    tensors_on_rank,
)
from megapromoe.planning.machines import Assumptions, Machine
from megapromoe.planning.memory import fullest
from megapromoe.planning.traffic import (
    RECOMPUTED_PARTS,
    Batch,
    Collective,
    collectives,
    expected_batch,
    routed_images,
    routed_rows,
)
from megapromoe.planning.zero import scatters_gradients, zero_of

# Kernels of a block, forward and backward, as counted by torch's dispatcher without views. The contrastive loss is not
# included, because it is computed once for all layers.
DENSE_KERNELS = 62
MOE_KERNELS = {"promoe": 145, "promoe_linear": 130, "tc": 105, "ec": 110, "diffmoe": 130}
OTHER_MOE_KERNELS = 220
GROUPED_KERNELS, EXPERT_KERNELS = 18, 10  # kernels of grouped products; kernels of each expert without them
PASSES = 6  # number of reads and writes of a saved activation or its gradient by kernels other than products
UPDATE = 4 + 3 * 8  # bytes per element: gradient read, master and moments read and written
AVERAGE_UPDATE = 12  # bytes per element and average: master read, average read and written
HOST_RATE = 20e9  # bytes per second of host memory for each GPU, if the optimizer is offloaded


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the fullest rank.

    `compute` is the larger of `device` (`products` + `attention` + `elementwise`) and `host`, or their sum if the host
    runs the kernels itself (`asynchronous` is false). `total` is the sum of `compute`, `exposed` and `update`;
    `overlapped` communication adds no time.
    """

    products: float
    attention: float
    elementwise: float
    host: float
    layers_traffic: float
    exposed_gradients: float
    overlapped: float
    update: float
    asynchronous: bool = True

    @property
    def device(self) -> float:
        return self.products + self.attention + self.elementwise

    @property
    def compute(self) -> float:
        return compute_time(self.device, self.host, self.asynchronous)

    @property
    def exposed(self) -> float:
        """Communication that is not overlapped with computation."""
        return self.layers_traffic + self.exposed_gradients

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def compute_time(device: float, host: float, asynchronous: bool) -> float:
    """Seconds of the computation, from those of the device and of the host."""
    return max(device, host) if asynchronous else device + host


def step_time(config: Config, layout: Layout, machine: Machine, assume: Assumptions) -> StepTime:
    """Estimates the time of an optimizer step."""
    batch, micro = expected_batch(config, layout), config.train.accumulation
    products = micro * sum(_product(layer, config, layout, batch, machine, assume) for layer in layers(config.model))
    attention = micro * _attention(config, layout, machine, assume)
    made, kept = (
        sum(line.bytes for line in saved_tensors(c, layout, batch)) for c in (_without_recompute(config), config)
    )
    elementwise = micro * PASSES * (made + 0.5 * (made - kept)) / (machine.hbm * assume.memory)
    host = micro * _host(config, layout, machine, assume)
    ours, gradients, of_shards, gathered, update = 0.0, 0.0, 0.0, 0.0, 0.0
    for c in collectives(config, layout):
        seconds = collective_time(c, config, layout, machine, assume)
        if c.phase == "gradients" and c.over.endswith("replicas"):
            of_shards += seconds
        elif c.phase == "gradients":
            gradients += seconds
        elif c.ours and c.phase != "update":
            ours += seconds
        elif c.phase == "update":
            update += seconds
        else:
            gathered += seconds
    compute = compute_time(products + attention + elementwise, host, machine.asynchronous)
    hidden_gradients, hidden_gathers = _hidden(config, layout, gradients, of_shards, gathered, compute)
    exposed = gradients + of_shards + gathered - hidden_gradients - hidden_gathers
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        host=host,
        layers_traffic=ours,
        exposed_gradients=exposed,
        overlapped=hidden_gradients + hidden_gathers,
        update=update + _update(config, layout, machine, assume),
        asynchronous=machine.asynchronous,
    )


def _without_recompute(config: Config) -> Config:
    return replace(config, parallel=replace(config.parallel, recompute="none"))


def _product(
    layer: Linear, config: Config, layout: Layout, batch: Batch, machine: Machine, assume: Assumptions
) -> float:
    """Seconds of the forward pass, both gradients and the recomputation of a group of equal linear layers."""
    if not layer.rows and layer.part != "unconditional expert":  # tables and norms
        return 0.0
    model = config.model
    if layer.part == "routed experts":
        rows = routed_rows(model, batch) / (1 if layout.etp > 1 else layout.tp)
        rows *= fullest(model, layout, assume.imbalance)
        slots = mean(layout.dispatch_slots(model))
        copies, tp = layer.copies / model.num_experts * slots, layout.etp
        rows = rows / slots + assume.tile / 2  # an expert's last tile is half full on average
    elif layer.part == "unconditional expert":
        rows, copies, tp = (batch.images - batch.conditional) * model.tokens, layer.copies, layout.tp
    elif layer.part == "conditional expert":
        rows, copies, tp = batch.conditional * model.tokens, layer.copies, layout.tp
    else:
        images = routed_images(model, batch) if layer.part == "router" else batch.images
        copies = max(layer.copies, 1)
        rows, tp = images * layer.rows / copies, layout.tp
    b = zero_of(config).width
    peak = machine.peak if b == 2 else machine.peak_fp32
    inputs = layer.inputs / (tp if layer.split == "rows" else 1)
    outputs = layer.outputs / (tp if layer.split == "columns" else 1)
    arithmetic = 2 * rows * inputs * outputs / (peak * assume.products)
    memory = (rows * inputs + inputs * outputs + rows * outputs) * b / (machine.hbm * assume.memory)
    recomputed = layer.part in RECOMPUTED_PARTS[config.parallel.recompute]
    return copies * max(arithmetic, memory) * (4 if recomputed else 3)


def _attention(config: Config, layout: Layout, machine: Machine, assume: Assumptions) -> float:
    """Seconds of attention in one micro-batch: two products forward; five backward, which include the scores again."""
    model = config.model
    forward = 4 * model.sequence**2 * model.hidden_size * model.depth * layout.micro_batch / layout.tp
    passes = 3.5 + ("attention" in RECOMPUTED_PARTS[config.parallel.recompute])
    peak = machine.peak if zero_of(config).width == 2 else machine.peak_fp32
    return forward * passes / (peak * assume.attention)


def _host(config: Config, layout: Layout, machine: Machine, assume: Assumptions) -> float:
    """Seconds of host time to launch the kernels of one micro-batch."""
    model = config.model
    moe = len(model.moe_blocks)
    again = RECOMPUTED_PARTS[config.parallel.recompute]
    dense, routed = (4 / 3 if part in again else 1 for part in ("attention", "routed experts"))
    kernels = (model.depth - moe) * DENSE_KERNELS * dense
    one_moe, zero = float(MOE_KERNELS.get(model.router, OTHER_MOE_KERNELS)), zero_of(config)
    if moe and not (machine.grouped and zero.width == 2):
        one_moe += EXPERT_KERNELS * mean(layout.dispatch_slots(model)) - GROUPED_KERNELS
    kernels += moe * one_moe * routed
    replicated, of_experts = tensors_on_rank(model, layout)
    return kernels * assume.launch + (len(replicated) + len(of_experts)) * (
        assume.gather_hook if zero.stage == 3 else assume.hook
    )


def collective_time(c: Collective, config: Config, layout: Layout, machine: Machine, assume: Assumptions) -> float:
    """Seconds of all calls of a collective.

    Ranks of a group are `stride` apart. Ranks of the same node use NVLink, and together all their network links.
    """
    strides = {"tp": 1, "world": 1, "dp": layout.tp, "ep": layout.etp, "edp": layout.ep * layout.etp}
    kind, _, part = c.over.partition("_")  # a direction, or the shards or replicas of one
    stride = strides[kind] * ((layout.edp_shard if kind == "edp" else layout.dp_shard) if part == "replicas" else 1)
    nodes = nodes_of(c.size, stride, machine)
    near = -(-c.size // nodes)
    inside, between = machine.nvlink * assume.links, machine.network * assume.between_nodes
    if c.leaves:
        seconds = c.payload * max((near - 1) / inside, (c.size - near) / between) / (c.size - 1)
    elif c.op == "all_to_all":
        seconds = max(c.payload * (near - 1) / c.size / inside, c.payload * (c.size - near) / c.size / between)
        seconds *= fullest(config.model, layout, assume.imbalance)
    else:
        passes = 2 if c.op == "all_reduce" else 1
        share = (near - 1) / near / inside, (nodes - 1) / nodes / (near * between)
        seconds = passes * c.payload * max(share)
    peers = c.size - 1 if c.op == "all_to_all" else 0
    return c.count * (seconds + assume.near + assume.far * math.log2(nodes) + assume.peer * peers)


def nodes_of(size: int, stride: int, machine: Machine) -> int:
    """Number of nodes, or of NVLink domains, that contain a group of `size` ranks, which are `stride` apart."""
    return -(-size // min(size, max(1, machine.nvlink_gpus // stride)))


def _hidden(
    config: Config, layout: Layout, gradients: float, of_shards: float, gathered: float, compute: float
) -> tuple[float, float]:
    """Seconds of gradient reduction and of stage 3's gathers that are overlapped with computation.

    Nonzero only with `overlap_comm`, and at most half of the computation each. The last gradient bucket is complete
    when the backward pass ends, so it is never overlapped; a model smaller than a bucket overlaps nothing. Buckets of a
    reduce-scatter are parameter groups, and the last one of replicated parameters and of experts counts. The sums of
    shards over replicas, `of_shards` seconds, are in the last micro-batch.
    """
    zero = zero_of(config)
    if not zero.overlap:
        return 0.0, 0.0
    replicated, routed = tensors_on_rank(config.model, layout)
    buckets, last = (sum(replicated) + sum(routed)) / zero.bucket, 1
    if scatters_gradients(config):
        groups = [group for group in optimizer_groups(config, layout) if group.ranks * group.replicas > 1]
        buckets, last = len(groups), len({group.routed for group in groups})
    micro, early = config.train.accumulation, 1 - last / max(buckets, last, 1)
    often = micro if zero.stage >= 2 else 1  # micro-batches that reduce gradients
    backward = compute / 2 / micro
    before_last = min(early * gradients / often, backward) * (often - 1)
    in_last = min(early * (gradients / often + of_shards), backward)
    return before_last + in_last, min(gathered, compute / 2)


def _update(config: Config, layout: Layout, machine: Machine, assume: Assumptions) -> float:
    """Seconds of the optimizer and the averaged weights, from their memory traffic; on the host if they are offloaded.

    With Muon also of its products of matrices, which the ranks share; its memory traffic counts as that of AdamW.
    """
    states = memory_per_rank(config, layout.world)
    averages = len(config.train.ema_decays)
    elements = states.ema / (4 * averages)
    update = elements * (UPDATE + averages * AVERAGE_UPDATE)
    if states.host:
        moved = elements * zero_of(config).width + states.parameters
        return update / HOST_RATE + moved / (machine.pcie * assume.links)
    peak = machine.peak if zero_of(config).width == 2 else machine.peak_fp32
    return update / (machine.hbm * assume.memory) + muon_flops(config, layout) / (peak * assume.products)


def muon_flops(config: Config, layout: Layout) -> float:
    """Operations by which a rank orthogonalises matrices in a step; at ZeRO stage 0 every rank does all of them."""
    train, stage = config.train, zero_of(config).stage
    if train.optimizer != "muon":
        return 0.0
    matrices = hidden_matrices(config.model, layout)
    return train.muon_steps * sum(m.flops / (m.ranks if stage else 1) for m in matrices)


def utilization(config: Config, layout: Layout, machine: Machine, seconds: float) -> float:
    """MFU: useful operations of a step, divided by the peak FLOP/s of all GPUs times the seconds of the step."""
    peak = machine.peak if zero_of(config).width == 2 else machine.peak_fp32
    useful = flops_per_image(config.model).training * config.train.global_batch
    return useful / (seconds * layout.world * peak)
