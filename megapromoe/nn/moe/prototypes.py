"""The arithmetic of prototypes: how much tokens resemble them, and the loss that keeps them apart.

Each with its gradient written out: autograd's version would launch twice the operators and keep copies of all tokens.
Source: ProMoE, arXiv 2510.24711, "Prototypical routing" and "Routing contrastive learning".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.distributed.collectives import sum_over
from megapromoe.distributed.mesh import Group

Choose = Callable[[Tensor], Tensor]


class Contrast(NamedTuple):
    """What a layer's contrastive loss is made of: prototypes (E, D); the sum (E, D) and the number (E,) of this rank's
    tokens of each expert, float32. Prototypes are a copy: ZeRO-3 takes a parameter away when its layer is done."""

    prototype_ED: Tensor
    sum_ED: Tensor
    count_E: Tensor


def resemblance(
    x: Tensor, prototype_ED: Tensor, choose: Choose | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cosines of tokens with prototypes; and of the tokens that chose each prototype, the sum and the number.

    Args:
        x: tokens (..., D).
        prototype_ED: (E, D).
        choose: cosines (..., E) -> the experts (..., K) of each token, int64. A token counts for all of its own.

    Returns:
        x·p / (|x| |p|), float32 (..., E); with `choose` float32 sums (E, D) and numbers (E,). The sums are a product
        with ones: adding by index is not reproducible on GPUs.
    """
    return _Resemblance.apply(x, prototype_ED, choose)


def contrastive_loss(prototype_ED: Tensor, sum_ED: Tensor, count_E: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each used expert's prototype against the centroids of all used experts; 0 if fewer than two.

    Args:
        prototype_ED: (E, D), or (..., E, D).
        sum_ED, count_E: sum and number of the tokens of each expert, (..., E, D) and (..., E); one loss for each of
            the leading dimensions.

    Returns:
        float32 (...). Computed in float64: E·D numbers cost nothing, and at a low temperature the gradient is a
        difference of near-equal terms. Nothing is indexed by "used", whose size would have to come to the host.

    Source: ProMoE, arXiv 2510.24711, routing contrastive loss.
    """
    return _Contrast.apply(prototype_ED, sum_ED, count_E, temperature)


def contrastive_losses(layers: Sequence[Contrast], temperature: float, scope: Group) -> Tensor:
    """`contrastive_loss` of several layers (L,), the tokens being those of all ranks of `scope`.

    All layers at once: each by itself would launch as many operators, and wait for messages of its own. So there is one
    message for all, and one back.
    """
    sum_LED, count_LE = torch.stack([c.sum_ED for c in layers]), torch.stack([c.count_E for c in layers])
    if scope.size > 1:
        said = sum_over(torch.cat([sum_LED, count_LE.unsqueeze(-1)], dim=-1), scope)
        sum_LED, count_LE = said[..., :-1], said[..., -1]
    return contrastive_loss(torch.stack([c.prototype_ED for c in layers]), sum_LED, count_LE, temperature)


class _Resemblance(torch.autograd.Function):
    """`resemblance`: the product first, divided by the lengths.

    One function, so that a token's gradient is one product for cosines and sums, and nothing of the size of the tokens
    is kept beside them: autograd's version would keep a normalised float32 copy, and add two gradients.
    """

    @staticmethod
    def forward(ctx, x, prototype_ED, choose):
        wide_TD = x.flatten(0, -2).float()
        ctx.kind = prototype_ED.dtype
        width_E = _length(prototype_ED.float())
        unit_ED = prototype_ED / width_E
        length_T = _length(wide_TD)
        cosine_TE = (wide_TD @ unit_ED.T).div_(length_T)
        cosine = cosine_TE.unflatten(0, x.shape[:-1])
        chosen = sum_ED = count_E = None
        if choose is not None:
            chosen = choose(cosine).flatten(0, -2)
            one_TE = torch.zeros_like(cosine_TE).scatter_(-1, chosen, 1.0)
            sum_ED, count_E = one_TE.T @ wide_TD, one_TE.sum(0)
            ctx.mark_non_differentiable(count_E)
        ctx.save_for_backward(x, width_E, unit_ED, length_T, cosine, chosen)
        return cosine, sum_ED, count_E

    @staticmethod
    def backward(ctx, grad, grad_sum_ED, _):
        x, width_E, unit_ED, length_T, cosine, chosen = ctx.saved_tensors
        x_TD, cosine_TE, grad_TE = (tensor.flatten(0, -2) for tensor in (x, cosine, grad))
        along_T = torch.linalg.vecdot(grad_TE, cosine_TE).unsqueeze(-1).div_(length_T.square())
        share_TE = grad_TE / length_T
        if chosen is None:
            grad_TD = share_TE @ unit_ED
        else:  # a token has the gradients of its sums, and of the cosines
            grad_TD = grad_sum_ED.index_select(0, chosen[:, 0])
            for k in range(1, chosen.shape[1]):
                grad_TD += grad_sum_ED.index_select(0, chosen[:, k])
            grad_TD.addmm_(share_TE, unit_ED)
        grad_x = grad_TD.addcmul_(x_TD, along_T, value=-1).to(x.dtype)
        grad_unit_ED = share_TE.T @ x_TD.float()
        return grad_x.view_as(x), _through_unit(grad_unit_ED, unit_ED, width_E).to(ctx.kind), None


class _Contrast(torch.autograd.Function):
    """`contrastive_loss`, with half of the operators that autograd's version takes."""

    @staticmethod
    def forward(ctx, prototype_ED, sum_ED, count_E, temperature):
        used_E = count_E > 0
        both_ED = torch.stack([prototype_ED.expand_as(sum_ED), sum_ED]).double()
        length_E = _length(both_ED)
        direction_ED = both_ED / length_E
        unit_ED, centroid_ED = direction_ED  # a centroid points where the sum does
        logit_EE = (unit_ED @ centroid_ED.mT).div_(temperature)
        # Hidden columns get probability zero; finite, so that a row without any other is no NaN.
        log_p_EE = logit_EE.masked_fill_(~used_E.unsqueeze(-2), -1e30).log_softmax(-1)
        # A single used expert has probability one: its loss and gradient are zero.
        weight_E = used_E.double() / used_E.sum(-1, keepdim=True).clamp_(min=1)
        ctx.save_for_backward(length_E, direction_ED, log_p_EE, weight_E)
        ctx.temperature, ctx.shape, ctx.types = temperature, prototype_ED.shape, (prototype_ED.dtype, sum_ED.dtype)
        return torch.linalg.vecdot(log_p_EE.diagonal(dim1=-2, dim2=-1), weight_E).neg_().float()

    @staticmethod
    def backward(ctx, grad):
        length_E, direction_ED, log_p_EE, weight_E = ctx.saved_tensors
        unit_ED, centroid_ED = direction_ED
        grad_EE = log_p_EE.exp()
        grad_EE.diagonal(dim1=-2, dim2=-1).sub_(1)
        grad_EE.mul_((weight_E * (grad / ctx.temperature).unsqueeze(-1)).unsqueeze(-1))
        grad_both_ED = torch.stack([grad_EE @ centroid_ED, grad_EE.mT @ unit_ED])
        grad_ED, grad_sum_ED = _through_unit(grad_both_ED, direction_ED, length_E)
        grad_ED = grad_ED.sum_to_size(ctx.shape)
        return grad_ED.to(ctx.types[0]), grad_sum_ED.to(ctx.types[1]), None, None


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_(min=1e-12)


def _through_unit(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient of a vector v, from that of v/|v|."""
    return torch.addcmul(grad, unit, torch.linalg.vecdot(grad, unit).unsqueeze(-1), value=-1).div_(length)
