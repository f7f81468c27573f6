"""Estimates the memory of one rank in a training step: states, activations (`activations.py`), DeepSpeed's buffers.

Letters as in `cost.py`; b is the size of an activation in bytes. Counts are means, which need not be whole numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megapromoe.config.expert_placement import CONTIGUOUS, smallest_slots
from megapromoe.config.layout import Layout
from megapromoe.config.model_options import (
    ModelConfig,
)
from megapromoe.config.options import Config
from megapromoe.planning.activations import saved_tensors, transient
from megapromoe.planning.cost import (
    OptimizerGroup,
    expert_elements,
    memory_per_rank,
    optimizer_groups,
    tensors_on_rank,
)
from megapromoe.planning.traffic import (
    Batch,
    expected_batch,
    routed_rows,
)
from megapromoe.planning.zero import scatters_gradients, zero_of

MUON_BATCH = 1 << 25  # elements of matrices that Muon orthogonalises at once, as in engine/muon.py


@dataclass(frozen=True)
class Budget:
    """Bytes on the device of the fullest rank. `peak` is the maximum over forward and backward pass and the update."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: float
    dispatch: float
    imbalance: float
    transient: float
    replicas: float
    buckets: float
    update: float
    host: int

    STATES = ("parameters", "gradients", "optimizer", "ema")
    STEP = ("activations", "dispatch", "imbalance", "transient", "replicas", "buckets")
    LINES = (*STATES, *STEP)

    @property
    def states(self) -> int:
        return sum(getattr(self, line) for line in self.STATES)

    @property
    def peak(self) -> float:
        return self.states + max(sum(getattr(self, line) for line in self.STEP), self.update)


def budget(config: Config, layout: Layout, imbalance: float = 1.0) -> Budget:
    """The memory of the fullest rank in a training step, in bytes.

    Args:
        imbalance: rows on the fullest rank relative to the mean, if all ranks hold equally many experts.

    Raises ConfigError where the DeepSpeed file is wrong.
    """
    states, batch, b = memory_per_rank(config, layout.world), expected_batch(config, layout), zero_of(config).width
    buckets, update = _deepspeed_buffers(config, layout, b)
    return Budget(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=0 if states.host else states.optimizer,
        ema=0 if states.host else states.ema,
        **both_passes(config, layout, batch, fullest(config.model, layout, imbalance)),
        buckets=buckets,
        update=update,
        host=states.host,
    )


def both_passes(config: Config, layout: Layout, batch: Batch, fullness: float = 1.0) -> dict[str, float]:
    """Bytes of both passes on a rank: the lines activations, dispatch, imbalance, transient, replicas of `Budget`.

    Args:
        batch: images of its micro-batch.
        fullness: rows that its experts get, relative to the mean over ranks.
    """
    model, b = config.model, zero_of(config).width
    saved = saved_tensors(config, layout, batch)
    local_rows = routed_rows(model, batch) / (1 if layout.etp > 1 else layout.tp) if model.moe_blocks else 0
    widest = 2 * local_rows * (model.hidden_size + model.moe_width / layout.etp) * b
    # Dispatch: rows sorted, received, sorted by expert, returned.
    return {
        "activations": sum(line.bytes for line in saved),
        "dispatch": 4 * local_rows * model.hidden_size * b if layout.ep > 1 else 0,
        "imbalance": (fullness - 1) * (sum(s.bytes for s in saved if s.rows) + widest),
        "transient": transient(config, layout, batch),
        "replicas": sum(replica_bytes(config, layout)),
    }


def replica_bytes(config: Config, layout: Layout) -> tuple[float, float]:
    """Bytes of copies of experts on the rank with the most: kept until the backward pass, and temporary ones in it.

    Recomputation fetches the weights of a layer again instead of keeping them. The temporary tensors are the gradients
    of a layer's copies, the message that they become, and the message that an owner gets, on average over ranks.

    Source: nn/moe/replicas.py.
    """
    if not layout.replicas:
        return 0.0, 0.0
    expert = expert_elements(config.model, layout.etp) * zero_of(config).width
    most = max(slots for slots, _ in layout.replicas)
    received = max(copies for _, copies in layout.replicas) / layout.ep
    recomputed = config.parallel.recompute != "none"
    kept = 0 if recomputed else sum(slots for slots, _ in layout.replicas)
    return kept * expert, (2 * most + received + (most if recomputed else 0)) * expert


def fullest(model: ModelConfig, layout: Layout, imbalance: float) -> float:
    """Rows of the fullest rank's experts relative to the mean, where it may hold one expert more. 1 without ep.

    A placement of a file, and copies of experts, balance rows and not numbers of experts.
    """
    if layout.ep == 1:
        return 1.0
    if layout.placed_slots or layout.replicas:
        return imbalance
    return imbalance * -(-model.num_experts // layout.ep) * layout.ep / model.num_experts


def placement_in_words(config: Config, world: int) -> str | None:
    """What the file `parallel.placement` costs in memory, in a sentence; None if it is no file. Raises ConfigError."""
    placements = config.placements_in_file()
    if not placements:
        return None
    slots = [placement.slots for placement in placements.values()]
    stored = str(min(slots)) if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    consecutive = replace(config, parallel=replace(config.parallel, placement=CONTIGUOUS))
    memory, before = memory_per_rank(config, world), memory_per_rank(consecutive, world)
    more = memory.device + memory.host - before.device - before.host
    smallest = smallest_slots(config.model.num_experts, config.parallel.ep)
    layout = config.layout(world)
    copies = ""
    if layout.replicas:
        slots_of_copies = [slots for slots, _ in layout.replicas]
        size = sum(replica_bytes(config, layout)) / 1e6
        most = max(slots_of_copies)
        copies = f"; up to {most} copies of experts of other ranks in a block, up to {size:,.1f} MB in a step"
    return (
        f"{config.parallel.placement}: a rank stores {stored} experts of a block instead of {smallest}:"
        f" {more / 1e6:,.1f} MB more states on each rank{copies}"
    )


def _deepspeed_buffers(config: Config, layout: Layout, b: int) -> tuple[float, float]:
    """Bytes of DeepSpeed's buffers during the backward pass, and during the update.

    Backward pass: gradient buckets, two with overlapped communication; at stage 3 also the gathered parameters. Update:
    stages 1 and 2 make a flat and a float32 copy of the gradients of a group. Source: DeepSpeed 0.19.8, runtime/zero.
    Gradients that are reduce-scattered have buckets for experts too, and a shard is flat already. Source:
    engine/deepspeed_backend/scatter.py.
    Muon adds the tensors of its update, see `engine/muon.py`.
    """
    zero = zero_of(config)
    replicated, routed = tensors_on_rank(config.model, layout)
    groups = optimizer_groups(config, layout)
    largest = max(sum(group.tensors) / group.ranks for group in groups)
    muon = _muon_temporaries(config, layout, b)
    if zero.stage == 0:
        return 0, max(min(zero.bucket, sum(replicated) + sum(routed)) * b, muon)
    if scatters_gradients(config):
        return zero.message_width * _scattered_buckets(groups, zero.overlap), largest * 4 + muon
    flat = zero.bucket * b if zero.contiguous else 0
    if zero.stage < 3:
        return flat * (2 if zero.overlap else 1), largest * (4 + b) + muon
    large = sum(n for n in (*replicated, *routed) if n > zero.small)
    small = sum(replicated) + sum(routed) - large
    return flat + (min(large, zero.kept + zero.ahead) + small) * b, largest * 4 + muon


def _scattered_buckets(groups: Sequence[OptimizerGroup], overlap: bool) -> int:
    """Elements of the buckets that exist together: one that is filled and one that is sent, for each kind of group.

    Beside them that of the parameters outside of blocks, which waits until the backward pass ends. Where parameters
    are divided over one rank, the buckets are the gradients themselves.
    """
    elements = 0
    for routed in (False, True):
        sizes = [group.shard * group.ranks for group in groups if group.routed == routed and group.ranks > 1]
        if sizes:
            elements += max(sizes) * min(len(sizes), 2 if overlap else 1) + (0 if routed else sizes[0])
    return elements


def _muon_temporaries(config: Config, layout: Layout, b: int) -> float:
    """Bytes of Muon's temporary tensors for the largest group, at stage 0 for the largest parameter.

    For each element the gradient that is applied and the direction in fp32, results and update in the trained type;
    and the matrices, Gram matrices and polynomials of one batch. Source: engine/muon.py.
    """
    groups = [group for group in optimizer_groups(config, layout) if group.uses_muon and group.tensors]
    stage = zero_of(config).stage
    sizes = [sum(g.tensors) / g.ranks if stage else float(max(g.tensors)) for g in groups]
    return max((n * (8 + 2 * b) + min(n, MUON_BATCH) * (4 + 4 * b) for n in sizes), default=0.0)
