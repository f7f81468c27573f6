"""Initial values of one rank's parameters, drawn tensor by tensor, or expert by expert.

A value depends only on (seed, name, expert), so that the logical model is the same at every layout, and so that a rank
can draw exactly those tensors of which it keeps something. Drawing needs memory for one tensor, or for one expert of a
tensor of routed experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.distributed.shard_ranges import ShardRange, copy_range
from megapromoe.nn.logical_module import initial_value


class InitialValues:
    """Writes initial values into this rank's tensors, or into parts of them."""

    def __init__(self, model: nn.Module, layouts: Mapping[str, ParameterLayout], mesh: Mesh, seed: int):
        """Draws nothing yet.

        Args:
            model: whose modules define the values; its tensors are on the meta device, at their logical shapes.
            layouts: of its parameters.
            mesh: of this rank.
            seed: determines the values.
        """
        self.model, self.layouts, self.mesh, self.seed = model, layouts, mesh, seed

    @torch.no_grad()
    def write(self, name: str, out: Tensor, start: int = 0) -> None:
        """Writes elements of this rank's flattened parameter; those of spare expert slots are zero.

        Args:
            name: of the parameter.
            out: flat, contiguous, of any type and device, (elements,).
            start: the first element to write.

        Raises InitialValueError if the module does not define the value.
        """
        layout = self.layouts[name]
        target = layout.shard_range(self.mesh, start, start + out.numel())
        if target.has_padding:
            out.zero_()
        if not layout.expert:
            if target.boxes:
                copy_range(target, out, ShardRange.of_tensor(layout.shape), self._draw(name, layout.shape, name))
            return
        expert_range = ShardRange.of_tensor((1, *layout.shape[1:]))
        ((local, logical),) = expert_range.pairs
        for expert in layout.placement(self.mesh).owned(self.mesh.ep.rank):
            region = ((expert, expert + 1), *logical[1:])
            if target.overlaps(region):
                source = ShardRange(expert_range.shape, ((local, region),), 0, expert_range.stop)
                copy_range(target, out, source, self._draw(name, layout.shape[1:], name, expert))

    def buffer(self, name: str) -> Tensor:
        """The initial value of a buffer, on the CPU. Raises InitialValueError if its module does not define it."""
        return self._draw(name, tuple(self.model.get_buffer(name).shape), name).view(self.model.get_buffer(name).shape)

    def _draw(self, name: str, shape: tuple[int, ...], *key: str | int) -> Tensor:
        """The value of a tensor with the key, flat, on the CPU."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        dtype = getattr(module, attribute).dtype
        value = initial_value(module, attribute, torch.Size(shape), dtype, self._generator(*key))
        return value.contiguous().view(-1)

    def _generator(self, *key: str | int) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *key))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
