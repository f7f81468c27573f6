"""What an MoE layer returns besides its output, and the losses of all layers of a model.

A loss that a layer can compute alone is in `MoEAuxiliary.losses`. The contrastive loss needs sums over the
data-parallel ranks: a layer returns its inputs (`MoEAuxiliary.joint_losses`), and `auxiliary_losses` computes it for
all layers together, with one all-reduce forward and one backward.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class JointLoss(Protocol):
    """The inputs of a loss of one layer that is computed for several layers together."""

    @property
    def joint_key(self) -> Hashable:
        """Losses with equal keys are computed together; it also contains the class."""

    @staticmethod
    def joint_loss(layers: Sequence[Any]) -> Tensor:
        """The weighted losses (M,) of M layers with equal keys. Collective."""


class MoEAuxiliary(NamedTuple):
    """What one MoE layer returns besides its output. Logged values have no gradients."""

    losses: Mapping[str, Tensor]
    """Name -> weighted scalar, complete; empty in eval mode."""
    joint_losses: Mapping[str, JointLoss]
    """Name -> inputs of a loss that `auxiliary_losses` computes; empty in eval mode."""
    load_E: Tensor
    """Rows of each expert on this rank, dropped ones included, float32 (E,)."""
    mean_weight: Tensor
    """Mean routing weight of the rows, scalar."""
    dropped: Tensor | None
    """Share of this rank's rows that were dropped, scalar; None if none can be."""


def auxiliary_losses(layers: Sequence[MoEAuxiliary]) -> dict[str, Tensor]:
    """The weighted losses of all layers of a model: name -> (M,), in the order of the M layers that have this loss.

    Collective if losses are computed over several ranks (`model.batch_scope=global`): every rank calls it with the same
    layers.
    """
    names = dict.fromkeys(name for layer in layers for name in layer.losses)
    names |= dict.fromkeys(name for layer in layers for name in layer.joint_losses)
    return {name: _losses(name, layers) for name in names}


def auxiliary_loss(layers: Sequence[MoEAuxiliary]) -> Tensor:
    """The sum of `auxiliary_losses`, scalar, to be added to the loss of a model. Collective."""
    total = layers[0].mean_weight.new_zeros(()) if layers else torch.zeros(())
    for loss_M in auxiliary_losses(layers).values():
        total = total + loss_M.sum()
    return total


def _losses(name: str, layers: Sequence[MoEAuxiliary]) -> Tensor:
    complete = {m: layer.losses[name] for m, layer in enumerate(layers) if name in layer.losses}
    groups: dict[Hashable, list[int]] = {}
    for m, layer in enumerate(layers):
        if name in layer.joint_losses:
            groups.setdefault(layer.joint_losses[name].joint_key, []).append(m)
    joint: dict[int, Tensor] = {}
    for members in groups.values():
        inputs = [layers[m].joint_losses[name] for m in members]
        loss_M = inputs[0].joint_loss(inputs)
        if len(groups) == 1 and not complete:
            return loss_M
        joint |= dict(zip(members, loss_M.unbind(), strict=True))
    losses = complete | joint
    return torch.stack([losses[m] for m in range(len(layers)) if m in losses])
