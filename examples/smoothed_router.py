"""ProMoE whose contrastive loss has smoothed targets: a regulariser like label smoothing.

    megapromoe train --preset digits --run-dir runs/smoothed model.router=examples/smoothed_router.py:SmoothedRouter

The contrastive loss is a cross-entropy: prototype i is to recognise the centroid m_i of its tokens among the centroids
of the n experts that got any. Here the target of prototype i is 1 - ε at i and ε / (n - 1) at the others. With the
logits z_ij = cos(p_i, m_j) / τ, that adds the mean over i of ε (z_ii - mean_{j≠i} z_ij) to the loss. The choice of
experts and their weights stay ProMoE's. The addition is logged as `smoothing_loss`.

Source: the variant "lsreg" with a fixed ε of github.com/kmittle/ProMoE-Plus, models/models_ProMoE_TC_lsreg.py. It also
has an ε for each prototype that depends on its number of tokens. Label smoothing: arXiv 1512.00567.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.nn import RouterOutput, RoutingCache
from megapromoe.nn.moe.prototypes import ContrastiveInputs
from megapromoe.nn.moe.routers import PrototypeRouter

EPSILON = 0.05


class SmoothedRouter(PrototypeRouter):
    """The router `promoe` with smoothed targets of its contrastive loss."""

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        cache = routing_cache or RoutingCache()
        output = super().forward(x_BSD, y_B, cache)
        contrast = output.joint_losses.get("rcl")  # none in eval mode, and with model.rcl_weight=0
        if not isinstance(contrast, ContrastiveInputs):
            return output
        packed = torch.cat([contrast.sum_ED, contrast.count_E.unsqueeze(1)], dim=1)
        packed = self.sum_over_group("smoothing", packed, cache)  # over the ranks that the contrastive loss counts
        added = smoothing(contrast.prototype_ED, packed[:, :-1], packed[:, -1], contrast.temperature)
        return output._replace(losses={**output.losses, "smoothing": contrast.weight * EPSILON * added})


def smoothing(prototype_ED: Tensor, sum_ED: Tensor, count_E: Tensor, temperature: float) -> Tensor:
    """The mean over used experts i of z_ii - mean_{j≠i} z_ij, in float64; 0 if fewer than two are used.

    Args:
        prototype_ED: the prototypes.
        sum_ED: sum of the tokens of each expert; its direction is that of the centroid.
        count_E: number of the tokens of each expert, which is used if it has any.
        temperature: divides the cosines.
    """
    is_used_E = (count_E > 0).double()
    number = is_used_E.sum()
    logit_EE = F.normalize(prototype_ED.double(), dim=1) @ F.normalize(sum_ED.double(), dim=1).T / temperature
    diagonal_E = logit_EE.diagonal()
    others_E = (logit_EE @ is_used_E - diagonal_E) / (number - 1).clamp(min=1)
    mean = ((diagonal_E - others_E) * is_used_E).sum() / number.clamp(min=1)
    return torch.where(number > 1, mean, torch.zeros_like(mean))
