"""DeepSpeed as a `ShardedBackend`. Everything that depends on DeepSpeed's internals is in this folder."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.engine.deepspeed_backend import partitions, start
from megapromoe.engine.deepspeed_backend.internals import SUPPORTED, missing_internals
from megapromoe.engine.deepspeed_backend.scatter import GradientScatter
from megapromoe.engine.deepspeed_backend.step import StepByPartitions
from megapromoe.engine.eager_adamw import EagerAdamW
from megapromoe.engine.muon import HIDDEN_MATRICES, hidden_parameters
from megapromoe.engine.protocol import EngineError, PartitionShards, PartitionUpdate
from megapromoe.nn.dit import DiT
from megapromoe.planning.zero import scatters_gradients


class DeepSpeedAdapter:
    """Implements `ShardedBackend` with DeepSpeed's engine and its ZeRO optimizers."""

    def __init__(self, model: DiT, config: Config, mesh: Mesh, ds: dict[str, Any], clip: float):
        """Starts DeepSpeed's engine. Collective.

        Args:
            model: float32, this rank's part, with `model.layouts`.
            ds: content of the file that `train.deepspeed` names.
            clip: the norm to which `step` clips gradients, measured by `reported_norm`; 0 to not clip.

        Raises EngineError if the optimizer cannot run on this machine, if DeepSpeed refuses `ds`, or if it lacks one of
        `INTERNALS`.
        """
        start.join_job()
        start.register_groups(mesh)
        start.mark_experts(model, mesh)
        self.optimizer = start.make_optimizer(config, model, mesh)  # DeepSpeed wraps this object and calls its step
        settings = {
            **ds,
            "train_micro_batch_size_per_gpu": config.layout(mesh.world_size).micro_batch,
            "gradient_accumulation_steps": config.train.accumulation,
            "gradient_clipping": clip,  # always set, because the default of 0.19.8 is 1.0
        }
        hidden = hidden_parameters(config, model.layouts)
        if isinstance(self.optimizer, EagerAdamW):  # 0.19.8 knows the class of torch, not ours
            settings["zero_allow_untested_optimizer"] = True
        self._engine = start.start_engine(config, model, self.optimizer, mesh, settings)
        self._stage: int = ds.get("zero_optimization", {}).get("stage", 0)
        if missing := self.missing_internals():
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, on which training relies;"
                f" install a supported version: pip install '{SUPPORTED}'"
            )
        self.reported_norm = torch.tensor(1.0)
        partitions.replace_norm(self._stage, self._engine.optimizer, lambda: self.reported_norm)
        self.partitions = tuple(
            partitions.make_partitions(self._stage, self._engine.optimizer, self.module, hidden, self._uses_muon)
        )
        scatters = scatters_gradients(config)
        if scatters:
            routed = [bool(self.parameter_group(number).get("moe")) for number in range(len(self.partitions))]
            replicas = [mesh.replica_group(expert) for expert in routed]
            GradientScatter(self._engine.optimizer, self.partitions, replicas, mesh.dp.size, self.device)
        self._step: StepByPartitions | None = None
        if config.train.adamw_backend == "fused":
            copies = self._stage < 3 and not scatters
            self._step = StepByPartitions(self._stage, self._engine.optimizer, self.partitions, self.device, copies)

    def missing_internals(self) -> list[str]:
        """The names that the adapter needs and the installed DeepSpeed does not have."""
        return missing_internals(self._stage, self._engine.optimizer, next(iter(self.module.parameters())))

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def module(self) -> DiT:
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def step_by_partitions(self, update: PartitionUpdate) -> None:
        assert self._step is not None, "only train.adamw_backend=fused updates by partitions"
        self._step.update = update
        self._engine.step()

    def parameter_group(self, partition: int) -> dict[str, Any]:
        zero = self._engine.optimizer
        return self.optimizer.param_groups[zero.sub_group_to_group_id[partition] if self._stage == 3 else partition]

    def _uses_muon(self, partition: int) -> bool:
        return bool(self.parameter_group(partition).get(HIDDEN_MATRICES))

    def shards(self, partition: int) -> PartitionShards:
        zero = self._engine.optimizer
        return partitions.shards_of(self._stage, zero, self.module, partition, self.partitions[partition])

    def gradients(self, partition: int) -> list[Tensor]:
        return partitions.gradients_of(self._stage, self._engine.optimizer, partition, self.partitions[partition])

    def sync_parameters_from_masters(self) -> None:
        partitions.sync_parameters_from_masters(self._stage, self._engine.optimizer, self.partitions)

    def close(self) -> None:
        self._engine.destroy()
