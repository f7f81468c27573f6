"""Records the rows of each expert in some steps of a training run (`train.routing_trace_every`); see `routing_trace`.

The counts are those that the layers report anyway (`MoEAuxiliary.load_E`). They stay on the device until the next log
line or save, where the host waits anyway; then rank 0 gathers those of all data-parallel ranks and appends them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.routing_trace import TraceRecord, decode, encode
from megapromoe.training.log_files import AppendedFile, LogFolder
from megapromoe.training.metrics import rewind


class RoutingRecorder:
    """Appends a record for each step that is a multiple of `train.routing_trace_every`, if it changed the model.

    Args:
        config: configuration of the run.
        mesh: the layout. Rank 0 writes.
        file: the trace, in the run directory. Records of steps after `first_step` are dropped, also if this start
            records nothing, because these steps are repeated.
        first_step: steps completed before.
        owner_ME: see `TraceRecord.owner_ME`.
    """

    def __init__(self, config: Config, mesh: Mesh, file: Path, first_step: int = 0, owner_ME: np.ndarray | None = None):
        self.mesh, self.blocks = mesh, config.model.moe_blocks
        self.experts, self.owner_ME = config.model.num_experts, owner_ME
        self.every = config.train.routing_trace_every if self.blocks else 0
        self._step = first_step  # completed steps
        self._rows_ME: Tensor | None = None  # of the micro-batches of the current step, int32
        self._pending: list[tuple[int, Tensor]] = []  # step, flat: its rows, then whether it was applied
        self._folder: LogFolder | None = None
        if mesh.rank == 0 and (self.every or os.path.lexists(file)):
            self._folder = LogFolder(file.parent)
            self._file = AppendedFile(
                file, self._folder, lambda: rewind(file, first_step, lambda line: decode(line.encode()).step)
            )
            self._file.flush()

    def add(self, auxiliary: AuxiliaryOutput) -> None:
        """Adds a micro-batch of the current step, without a host sync."""
        if self.every and (self._step + 1) % self.every == 0:
            rows_ME = auxiliary.load_ME.detach().to(torch.int32)
            self._rows_ME = rows_ME if self._rows_ME is None else self._rows_ME + rows_ME

    def end_step(self, applied: Tensor) -> None:
        """Ends the current step, without a host sync.

        Args:
            applied: whether the step changed the model, () bool on the device. A step that did not is not recorded: its
                loss was not finite or that of a spike, and its routing may be meaningless.
        """
        self._step += 1
        if self._rows_ME is not None:
            self._pending.append((self._step, torch.cat([self._rows_ME.flatten(), applied.to(torch.int32).view(1)])))
            self._rows_ME = None

    def write(self) -> None:
        """Appends the records of the steps since the last call. Collective; does nothing if there are none."""
        pending, self._pending = self._pending, []
        if not pending or self.mesh.tp.rank:  # tensor-parallel ranks have the same tokens
            return
        dp, of_rank_NX = self.mesh.dp, torch.stack([packed for _, packed in pending])
        gathered = [torch.empty_like(of_rank_NX) for _ in range(dp.size)] if dp.rank == 0 else None
        dist.gather(of_rank_NX, gathered, dst=dp.ranks[0], group=dp.process_group)
        if gathered is None:
            return
        packed_RNX = torch.stack(gathered).cpu().numpy()
        for number, (step, _) in enumerate(pending):
            if packed_RNX[:, number, -1].all():
                rows_RME = packed_RNX[:, number, :-1].reshape(dp.size, len(self.blocks), self.experts)
                layout = self.mesh.ep.size, self._group, self.owner_ME
                self._file.write(encode(TraceRecord(step, self.blocks, rows_RME, *layout)))

    def close(self) -> None:
        """Closes the file. Steps since the last `write` are lost: the next start repeats them."""
        if self._folder is not None:
            self._file.close()
            self._folder.close()

    @property
    def _group(self) -> int:
        """See `TraceRecord.group`."""
        tp = self.mesh.tp.size
        return math.lcm(self.mesh.ep.size * self.mesh.etp, tp) // tp
