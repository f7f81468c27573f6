"""The layout of a run over its ranks."""

from dataclasses import dataclass

from megapromoe.config.expert_placement import smallest_slots
from megapromoe.config.model_options import ModelConfig


@dataclass(frozen=True)
class Layout:
    """The sizes of the process groups of a run, the images of a rank's micro-batch, and where experts are.

    `placed_slots`: for each block with routed experts, how many a rank stores; empty for consecutive experts.
    `shard_ranks`: consecutive ranks over which ZeRO stages 1 and 2 divide optimizer states; 0: all.
    `replicas`: for each of these blocks, copies on the rank with the most, and on all ranks of an ep group together;
    empty without copies.
    """

    world: int
    tp: int
    ep: int
    dp: int
    edp: int
    etp: int
    micro_batch: int
    placed_slots: tuple[int, ...] = ()
    shard_ranks: int = 0
    replicas: tuple[tuple[int, int], ...] = ()

    @property
    def dp_shard(self) -> int:
        """The data-parallel ranks over which ZeRO divides what is not of routed experts."""
        return self.shard_ranks // self.tp if self.shard_ranks else self.dp

    @property
    def edp_shard(self) -> int:
        """The expert-data-parallel ranks over which ZeRO divides what is of routed experts."""
        return max(self.shard_ranks // (self.ep * self.etp), 1) if self.shard_ranks else self.edp

    def expert_slots(self, model: ModelConfig) -> tuple[int, ...]:
        """How many experts a rank stores, spare slots among them, for each block with routed experts."""
        return self.placed_slots or (smallest_slots(model.num_experts, self.ep),) * len(model.moe_blocks)

    def dispatch_slots(self, model: ModelConfig) -> tuple[int, ...]:
        """The same with copies of experts of other ranks: experts to which a rank can get rows."""
        slots = self.expert_slots(model)
        return (
            tuple(n + copies for n, (copies, _) in zip(slots, self.replicas, strict=True)) if self.replicas else slots
        )
