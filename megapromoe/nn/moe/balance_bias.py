"""Balances the load of experts by a bias instead of a loss.

Each expert e of a layer has a bias b_e, which is added to its scores for the choice of experts, but not to its routing
weight. After each optimizer step

    b_e <- b_e + rate * sign(mean_f(c_f) - c_e),

where c_e is the number of rows that the images of all data-parallel ranks and micro-batches of this step sent to
expert e, and `rate` is `model.balance_bias`. Biases have no gradient. They are buffers: saved with the model, equal on
all ranks, not averaged, and used at inference too. A step that is not applied to the weights does not change them.

The scores are the softmax probabilities of a linear gate, and the cosines of prototypes. The paper adds the bias to the
sigmoid or softmax of a gate; for cosines this is inferred.

Source: "Auxiliary-loss-free load balancing strategy for mixture-of-experts", arXiv 2408.15664, algorithm 1; also
DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.distributed.mesh import SINGLE_RANK, Group
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.routers import Router


class BalanceBiases:
    """The biases of all routers of a model, and the load of the experts since their last update.

    In a training loop of one's own, call `add` with the auxiliary outputs of each micro-batch and `update` after each
    optimizer step. `Engine` does both.
    """

    def __init__(self, model: nn.Module, group: Group = SINGLE_RANK):
        """Finds the routers with a bias.

        Args:
            model: any module that contains our layers, whose forward pass runs them in the order of `modules()`.
            group: the data-parallel ranks, over which `update` sums the load.

        Raises ValueError if the layers have different numbers of experts.
        """
        self.group = group
        self._routers = [m for m in model.modules() if isinstance(m, Router) and m.config.balance_bias]
        experts = sorted({router.num_experts for router in self._routers})
        if len(experts) > 1:
            raise ValueError(f"the layers have {experts} experts: BalanceBiases needs one number; make one for each")
        self._load_ME: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether there are any biases."""
        return bool(self._routers)

    def add(self, layers: Sequence[MoEAuxiliary] | Tensor) -> None:
        """Counts a micro-batch.

        Args:
            layers: the auxiliary outputs of the M layers, or their rows of each expert (M, E) on this rank.

        Raises ValueError if M is not the number of layers with a bias.
        """
        if not self._routers:
            return
        load_ME = layers if isinstance(layers, Tensor) else torch.stack([layer.load_E for layer in layers])
        if load_ME.shape[0] != len(self._routers):
            raise ValueError(f"the load of {load_ME.shape[0]} layers: {len(self._routers)} layers have a balance bias")
        # Sums of whole numbers are exact in float64, so that all ranks and all layouts find the same signs.
        load_ME = load_ME.detach().double()
        self._load_ME = load_ME if self._load_ME is None else self._load_ME + load_ME

    def take_load(self) -> Tensor:
        """The rows (M, E) of each expert on this rank since the last call, float64."""
        load_ME, self._load_ME = self._load_ME, None
        if load_ME is None:
            load_ME = torch.stack([torch.zeros_like(router.balance_bias) for router in self._routers]).double()
        return load_ME

    @torch.no_grad()
    def apply(self, load_ME: Tensor, applied: Tensor | None = None) -> None:
        """Moves each bias by one step towards an even load.

        Args:
            load_ME: rows of each expert on all ranks, or a multiple of them, float64.
            applied: whether the optimizer step changed the weights, scalar bool; None: it did.
        """
        sign_ME = (load_ME.sum(1, keepdim=True) - load_ME.shape[1] * load_ME).sign()
        if applied is not None:
            sign_ME = torch.where(applied, sign_ME, 0.0)
        for router, sign_E in zip(self._routers, sign_ME.to(torch.float32).unbind(), strict=True):
            router.balance_bias.add_(sign_E, alpha=router.config.balance_bias)

    def update(self, applied: Tensor | None = None) -> None:
        """Moves the biases after an optimizer step. Collective over the group, if there are biases."""
        if not self._routers:
            return
        load_ME = self.take_load()
        if self.group.size > 1:
            dist.all_reduce(load_ME, group=self.group.process_group)
        self.apply(load_ME, applied)
