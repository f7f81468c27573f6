"""Linear layers for tensor parallelism, and the regions of a model in which ranks divide the work.

A *region* is a part of the model whose ranks all have the same input and each compute a part of the result: heads of an
attention, columns of an MLP, rows of an MoE layer. `copy_to_region` marks the input (its backward sums the gradients of
all ranks), `reduce_from_region` sums the partial outputs. Without tensor parallelism both are the identity, so the
model is the same code. `set_mesh` sets the region of a module.

Source: the conjugate operators f and g of Megatron-LM (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.distributed.collectives import copy_to_group, gather_last_dim, reduce_from_group
from megapromoe.distributed.mesh import SINGLE_RANK, Group, Mesh
from megapromoe.distributed.parameter_layout import Split
from megapromoe.nn.logical_module import LogicalModule, ParameterRule, xavier_uniform, xavier_uniform_halves, zeros


@dataclass(frozen=True)
class Region:
    """A part of the model whose work is divided over the ranks of `group`; a group of one rank does all of it."""

    group: Group = SINGLE_RANK

    @property
    def is_sharded(self) -> bool:
        """Whether the work is divided at all."""
        return self.group.size > 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank

    def copy_to_region(self, x: Tensor) -> Tensor:
        """The input, which is equal on all ranks; backward sums its gradient over the ranks."""
        return copy_to_group(x, self.group)

    def reduce_from_region(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' partial outputs; backward is the identity."""
        return reduce_from_group(partial, self.group)

    def gather_from_region(self, x: Tensor) -> Tensor:
        """Concatenates the ranks' slices (..., n/size) of the last dimension to (..., n)."""
        return gather_last_dim(x, self.group)


NO_TENSOR_PARALLEL = Region()


class RegionModule(LogicalModule):
    """A module that is a region, or that begins, ends or is inside one."""

    region: Region = NO_TENSOR_PARALLEL

    def set_mesh(self, mesh: Mesh) -> None:
        self.region = Region(mesh.tp)


class Linear(LogicalModule, nn.Linear):
    """A linear layer that starts as the linear layers of DiT do; every rank has all of it."""

    rules = {"weight": ParameterRule(xavier_uniform), "bias": ParameterRule(zeros)}


class ColumnLinear(Linear):
    """Linear layer inside a region, with the output features divided: x (..., in) -> (..., out/tp)."""

    rules = {
        "weight": ParameterRule(xavier_uniform, Split(0), hidden_matrices=1),
        "bias": ParameterRule(zeros, Split(0)),
    }


class QkvLinear(ColumnLinear):
    """Queries, keys and values in one layer: each third of the output features is divided."""

    rules = {
        "weight": ParameterRule(xavier_uniform, Split(0, blocks=3), hidden_matrices=3),
        "bias": ParameterRule(zeros, Split(0, blocks=3)),
    }


class GateUpLinear(ColumnLinear):
    """The two projections of a SwiGLU in one layer, [gate | up]: each half of the output features is divided."""

    rules = {
        "weight": ParameterRule(xavier_uniform_halves, Split(0, blocks=2), hidden_matrices=2),
        "bias": ParameterRule(zeros, Split(0, blocks=2)),
    }


class RowLinear(RegionModule, Linear):
    """Linear layer with the input features divided: x (..., in/tp) -> (..., out), summed over ranks, ends a region.

    With `partial` it returns the partial output and the bias: the caller adds up several layers before one sum over
    ranks, and adds the bias after it. The bias is None if it is in the output already.
    """

    rules = {"weight": ParameterRule(xavier_uniform, Split(1), hidden_matrices=1), "bias": ParameterRule(zeros)}

    @overload
    def forward(self, x: Tensor, partial: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, partial: Literal[True]) -> tuple[Tensor, Tensor | None]: ...

    def forward(self, x: Tensor, partial: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.region.is_sharded:
            y = F.linear(x, self.weight, self.bias)
            return (y, None) if partial else y
        y = F.linear(x, self.weight)
        # A clone, because ZeRO-3 frees a parameter when the forward of its module returns.
        return (y, self.bias.clone()) if partial else self.region.reduce_from_region(y) + self.bias

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output without the bias, and the bias: for callers in compiled code that add both to something else."""
        return F.linear(x, self.weight), self.bias


class GatheredLinear(RegionModule, Linear):
    """Linear layer whose output features are computed in slices and concatenated: x (..., in) -> (..., out)."""

    rules = {"weight": ParameterRule(xavier_uniform, Split(0)), "bias": ParameterRule(zeros, Split(0))}

    def forward(self, x: Tensor) -> Tensor:
        return self.region.gather_from_region(F.linear(self.region.copy_to_region(x), self.weight, self.bias))


class Modulation(GatheredLinear):
    """The linear layer of adaLN-Zero: shifts, scales and residual gates that start at zero."""

    rules = {"weight": ParameterRule(zeros, Split(0)), "bias": ParameterRule(zeros, Split(0))}
