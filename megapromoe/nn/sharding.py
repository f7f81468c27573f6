"""A model that is divided over ranks, for a training loop without our engine: gradients, their norm, and saving.

The rules are those of `distributed/parameter_layout.py`; DeepSpeed and our engine follow the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout


@dataclass(frozen=True)
class Sharding:
    """How a model is divided over ranks; made by `parallelize`.

    Attributes:
        model: this rank's part.
        mesh: the ranks.
        layouts: name of each parameter -> its layout.
    """

    model: nn.Module
    mesh: Mesh
    layouts: dict[str, ParameterLayout]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Makes the gradients those of the mean loss over all data-parallel ranks, in place. Collective.

        Each rank's loss is the mean over its own images. Call it once after the last backward pass of a step. A
        parameter without a gradient on this rank counts as zero, so that all ranks send the same messages.
        """
        parts: dict[tuple[Group, torch.dtype, torch.device], list[Tensor]] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                group = self.layouts[name].gradient_group(self.mesh)
                parts.setdefault((group, p.grad.dtype, p.grad.device), []).append(p.grad)
        for (group, _, _), gradients in parts.items():
            if group.size > 1:
                packed = torch.cat([gradient.flatten() for gradient in gradients])
                dist.all_reduce(packed, group=group.process_group)
                pieces = packed.split([gradient.numel() for gradient in gradients])
                reduced = [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
                torch._foreach_copy_(gradients, reduced)
            torch._foreach_div_(gradients, self.mesh.dp.size)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The 2-norm of the gradient of the logical model, float32 scalar, equal on all ranks. Collective.

        After `reduce_gradients`. Every logical element counts once, however many ranks have it.
        """
        total = None
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                layout = self.layouts[name]
                copies = layout.replica_count(self.mesh) * layout.gradient_group(self.mesh).size
                square = p.grad.float().square().sum() / copies
                total = square if total is None else total + square
        if total is None:
            total = next(self.model.parameters()).new_zeros((), dtype=torch.float32)
        if self.mesh.world.size > 1:
            dist.all_reduce(total, group=self.mesh.world.process_group)
        return total.sqrt()

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients down such that the norm is at most `max_norm`; returns the norm before. Collective."""
        norm = self.gradient_norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad))
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The state of the logical model, on every rank: what an undivided model would save. Collective.

        `load_state_dict` of an undivided model takes it, which `parallelize` can divide in another way.
        """
        state = dict(self.model.state_dict())
        for name, layout in self.layouts.items():
            state[name] = self._logical(state[name].detach(), layout)
        return state

    def _logical(self, local: Tensor, layout: ParameterLayout) -> Tensor:
        has_parts = layout.expert and self.mesh.ep.size > 1
        if not has_parts and layout.local_shape(self.mesh) == layout.shape:
            return local.clone()
        value = local.new_zeros(layout.shape)
        if self._is_first_copy(layout):
            for local_slice, logical_slice in layout.shard_slices(self.mesh):
                value[logical_slice] = local[local_slice]
        dist.all_reduce(value, group=self.mesh.world.process_group)  # one rank has each element, the others zero
        return value

    def _is_first_copy(self, layout: ParameterLayout) -> bool:
        """Whether this rank is the first of those with the same part of a parameter."""
        if layout.gradient_group(self.mesh).rank:
            return False
        return layout.replica_count(self.mesh) == 1 or self.mesh.tp.rank == 0
