"""Cosine scores of tokens and prototypes, and the contrastive loss that separates prototypes.

Both have a handwritten backward: autograd's would launch twice as many operators and keep copies of all tokens.
Source: ProMoE, arXiv 2510.24711, "Prototypical routing" and "Routing contrastive learning".
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.distributed.collectives import differentiable_all_reduce
from megapromoe.distributed.mesh import Group


class ContrastiveInputs(NamedTuple):
    """What the contrastive loss of one layer is computed from; a `JointLoss`."""

    prototype_ED: Tensor
    """A copy of the prototypes, because ZeRO-3 frees a parameter when the forward of its module returns."""
    sum_ED: Tensor
    """The sum of this rank's tokens of each expert, float32."""
    count_E: Tensor
    """The number of this rank's tokens of each expert, float32."""
    weight: float
    """Factor of the loss."""
    temperature: float
    """Divides the cosines."""
    group: Group
    """The ranks over whose tokens the loss is computed."""

    @property
    def joint_key(self) -> Hashable:
        return type(self), self.sum_ED.shape, self.sum_ED.dtype, self.weight, self.temperature, self.group

    @staticmethod
    def joint_loss(layers: Sequence[ContrastiveInputs]) -> Tensor:
        """The weighted losses (M,) of M layers over the tokens of all ranks. Collective."""
        first = layers[0]
        return first.weight * contrastive_losses(layers, first.temperature, first.group)


def router_precision(x: Tensor) -> Tensor:
    """The tensor in the precision in which routers compute: float64 if it has that, otherwise float32."""
    return x if x.dtype == torch.float64 else x.float()


def has_exact_product(x: Tensor) -> bool:
    """Whether a matrix product of tensors like `x` can give the float32 product of their values without copies.

    Products of two bfloat16 numbers are exact in float32, in which GPUs add them.
    """
    return x.is_cuda and x.dtype == torch.bfloat16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of routers.

    Where there is an exact product, tensor cores compute it. A float32 `a` is then split into two bfloat16 matrices
    whose sum has 16 of its 24 bits. No float32 copy of the tokens is written.
    """
    if not has_exact_product(b):
        return router_precision(a) @ router_precision(b)
    if a.dtype == b.dtype:
        # Fast kernels need a multiple of eight columns: twelve took 44 µs, sixteen 18 (H200, torch 2.11).
        num_columns = b.shape[1]
        padded = b if num_columns % 8 == 0 else F.pad(b.T, (0, 0, 0, -num_columns % 8)).T
        return _exact_product(a, padded)[:, :num_columns]
    # Truncated by a mask: torch.compile would remove a conversion to bfloat16 and back, and the low part with it.
    high = (a.view(torch.int32) & -(1 << 16)).view(torch.float32)
    low = a - high
    high_product, low_product = _exact_product(torch.cat([high, low]).to(b.dtype), b).chunk(2)
    return high_product + low_product


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.contiguous(), b, out_dtype=torch.float32)


class CosineScores(NamedTuple):
    """Cosines of tokens and prototypes, without gradients, and the intermediate values that `differentiable` reuses."""

    score: Tensor
    """x·p / (|x| |p|), float32 (..., E)."""
    x_TD: Tensor
    """The tokens, in float32 unless they have an exact product."""
    length_T: Tensor
    """|x|, (T, 1)."""
    unit_ED: Tensor
    """p / |p|."""
    prototype_length_E: Tensor
    """|p|, (E, 1)."""


@torch.no_grad()
def cosine_scores(x: Tensor, prototype_ED: Tensor) -> CosineScores:
    """Computes the cosines of tokens x (..., D) and prototypes (E, D): a product, divided by the lengths."""
    x_TD = x.flatten(0, -2)
    prototype_length_E = _length(router_precision(prototype_ED))
    unit_ED = prototype_ED / prototype_length_E
    if has_exact_product(x_TD) and prototype_ED.dtype == x_TD.dtype:
        length_T = _length(x_TD)
        score_TE = product(x_TD, prototype_ED.T) / (length_T * prototype_length_E.T)
    else:
        x_TD = router_precision(x_TD)
        length_T = _length(x_TD)
        score_TE = (x_TD @ unit_ED.T).div_(length_T)
    return CosineScores(score_TE.unflatten(0, x.shape[:-1]), x_TD, length_T, unit_ED, prototype_length_E)


def differentiable(
    x: Tensor, prototype_ED: Tensor, scores: CosineScores, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Connects cosine scores to the autograd graph, and sums the tokens that chose each prototype.

    Args:
        x: tokens (..., D).
        prototype_ED: prototypes (E, D).
        scores: `cosine_scores` of these two.
        chosen: the experts (..., K) of each token, int64; each token is added to the sums of all its experts.

    Returns:
        the scores, float32 (..., E); and, with `chosen`, the sums (E, D) and numbers (E,) of tokens, float32. The sums
        are a product with ones, which is reproducible on GPUs, unlike index_add.
    """
    return _DifferentiableScores.apply(x, prototype_ED, *scores, chosen)


def differentiable_chosen(
    x: Tensor, prototype_ED: Tensor, scores: CosineScores, chosen: Tensor, num_summed: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`differentiable` with the scores (..., K) of the chosen experts only, for torch.compile.

    Args:
        x, prototype_ED, scores: as there.
        chosen: the experts (..., K) of each token.
        num_summed: each token is added to the sums of the first so many of its experts; 0: no sums.
    """
    return _ChosenScores.apply(x, prototype_ED, *scores, chosen, num_summed)


def contrastive_loss(prototype_ED: Tensor, sum_ED: Tensor, count_E: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each used expert's prototype against the centroids of all used experts; 0 if fewer than two.

    Args:
        prototype_ED: (E, D), or (..., E, D).
        sum_ED: sum of the tokens of each expert, (..., E, D).
        count_E: number of the tokens of each expert, (..., E). An expert is used if it has any.
        temperature: divides the cosines.

    Returns:
        one loss for each of the leading dimensions, float32 (...). It is computed in float64: the E·D numbers cost
        little, and at a low temperature the gradient is a difference of nearly equal terms. Unused experts are masked,
        not removed by an index, whose size the host would have to read from the GPU.

    Source: ProMoE, arXiv 2510.24711, routing contrastive loss.
    """
    return _ContrastiveLoss.apply(prototype_ED, sum_ED, count_E, temperature)


def contrastive_losses(layers: Sequence[ContrastiveInputs], temperature: float, group: Group) -> Tensor:
    """`contrastive_loss` of M layers, (M,), over the tokens of all ranks of `group`. Collective.

    All layers are computed together, which takes the operators of one layer, one all-reduce forward and one backward.
    """
    sum_MED, count_ME = torch.stack([c.sum_ED for c in layers]), torch.stack([c.count_E for c in layers])
    if group.size > 1:
        packed = differentiable_all_reduce(torch.cat([sum_MED, count_ME.unsqueeze(-1)], dim=-1), group)
        sum_MED, count_ME = packed[..., :-1], packed[..., -1]
    return contrastive_loss(torch.stack([c.prototype_ED for c in layers]), sum_MED, count_ME, temperature)


class _DifferentiableScores(torch.autograd.Function):
    """`differentiable`. A single function, so that one product gives the gradient of a token from scores and sums.

    It keeps nothing of the size of the tokens besides the tokens. Autograd's version would keep a normalised float32
    copy and add two gradients.
    """

    @staticmethod
    def forward(ctx, x, prototype_ED, score, x_TD, length_T, unit_ED, prototype_length_E, chosen):
        ctx.prototype_dtype = prototype_ED.dtype
        sum_ED = count_E = None
        if chosen is not None:
            chosen = chosen.flatten(0, -2)
            sum_ED, count_E = _sums_of_chosen(score.flatten(0, -2), x_TD, chosen)
            ctx.mark_non_differentiable(count_E)
        ctx.save_for_backward(x, prototype_length_E, unit_ED, length_T, score, chosen)
        return score.view_as(score), sum_ED, count_E

    @staticmethod
    def backward(ctx, grad, grad_sum_ED, _):
        x, prototype_length_E, unit_ED, length_T, score, chosen = ctx.saved_tensors
        x_TD, score_TE, grad_TE = (tensor.flatten(0, -2) for tensor in (x, score, grad))
        parallel_T = torch.linalg.vecdot(grad_TE, score_TE).unsqueeze(-1).div_(length_T.square())
        scaled_TE = grad_TE / length_T
        if chosen is None:
            grad_TD = scaled_TE @ unit_ED
        else:  # a token gets gradients from its scores and from the sums of its experts
            grad_TD = grad_sum_ED.index_select(0, chosen[:, 0])
            for k in range(1, chosen.shape[1]):
                grad_TD += grad_sum_ED.index_select(0, chosen[:, k])
            grad_TD.addmm_(scaled_TE, unit_ED)
        grad_x = grad_TD.addcmul_(x_TD, parallel_T, value=-1).to(x.dtype)
        grad_unit_ED = product(scaled_TE.T, x_TD)
        grad_prototype_ED = _gradient_of_unnormalised(grad_unit_ED, unit_ED, prototype_length_E)
        return grad_x.view_as(x), grad_prototype_ED.to(ctx.prototype_dtype), *[None] * 6


class _ChosenScores(torch.autograd.Function):
    """`differentiable_chosen`: all gradients of a token come from its experts, and take no product with all of them."""

    @staticmethod
    def forward(ctx, x, prototype_ED, score, x_TD, length_T, unit_ED, prototype_length_E, chosen, num_summed):
        ctx.prototype_dtype, ctx.num_summed = prototype_ED.dtype, num_summed
        sum_ED = count_E = None
        if num_summed:
            summed_TK = chosen[..., :num_summed].flatten(0, -2)
            sum_ED, count_E = _sums_of_chosen(score.flatten(0, -2), x_TD, summed_TK)
            ctx.mark_non_differentiable(count_E)
        chosen_score = score.gather(-1, chosen)
        ctx.save_for_backward(x, prototype_length_E, unit_ED, length_T, chosen_score, chosen)
        return chosen_score, sum_ED, count_E

    @staticmethod
    def backward(ctx, grad, grad_sum_ED, _):
        x, prototype_length_E, unit_ED, length_T, chosen_score, chosen = ctx.saved_tensors
        x_TD, score_TK, grad_TK, chosen_TK = (tensor.flatten(0, -2) for tensor in (x, chosen_score, grad, chosen))
        scaled_TK = grad_TK / length_T
        parallel_T = (scaled_TK * score_TK).sum(-1, keepdim=True) / length_T
        grad_TD = -parallel_T * x_TD
        expert_E = torch.arange(unit_ED.shape[0], device=x.device)
        scaled_TE = torch.zeros((), dtype=scaled_TK.dtype, device=x.device)
        for k, (chosen_T, scaled_T) in enumerate(zip(chosen_TK.unbind(1), scaled_TK.split(1, 1), strict=True)):
            grad_TD = grad_TD + scaled_T * unit_ED.index_select(0, chosen_T)
            if k < ctx.num_summed:
                grad_TD = grad_TD + grad_sum_ED.index_select(0, chosen_T)
            scaled_TE = scaled_TE + torch.where(chosen_T.unsqueeze(1) == expert_E, scaled_T, 0.0)
        grad_unit_ED = product(scaled_TE.T, x_TD)
        grad_prototype_ED = _gradient_of_unnormalised(grad_unit_ED, unit_ED, prototype_length_E)
        return grad_TD.to(x.dtype).view_as(x), grad_prototype_ED.to(ctx.prototype_dtype), *[None] * 7


def _sums_of_chosen(score_TE: Tensor, x_TD: Tensor, chosen_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (E, D) and the numbers (E,) of the tokens that chose each expert."""
    is_chosen_TE = torch.zeros_like(score_TE).scatter_(-1, chosen_TK, 1.0)
    return product(is_chosen_TE.T.to(x_TD.dtype), x_TD), is_chosen_TE.sum(0)


class _ContrastiveLoss(torch.autograd.Function):
    """`contrastive_loss`, with half as many operators as autograd's version."""

    @staticmethod
    def forward(ctx, prototype_ED, sum_ED, count_E, temperature):
        used_E = count_E > 0
        stacked_ED = torch.stack([prototype_ED.expand_as(sum_ED), sum_ED]).double()
        length_E = _length(stacked_ED)
        direction_ED = stacked_ED / length_E
        unit_ED, centroid_ED = direction_ED  # the normalised sum is the normalised mean
        logit_EE = (unit_ED @ centroid_ED.mT).div_(temperature)
        # Masked columns get probability zero. The mask is finite, so that a row without other columns is not NaN.
        log_p_EE = logit_EE.masked_fill_(~used_E.unsqueeze(-2), -1e30).log_softmax(-1)
        # If only one expert is used, its probability is one: loss and gradient are zero.
        weight_E = used_E.double() / used_E.sum(-1, keepdim=True).clamp_(min=1)
        ctx.save_for_backward(length_E, direction_ED, log_p_EE, weight_E)
        ctx.temperature, ctx.shape, ctx.dtypes = temperature, prototype_ED.shape, (prototype_ED.dtype, sum_ED.dtype)
        loss = torch.linalg.vecdot(log_p_EE.diagonal(dim1=-2, dim2=-1), weight_E).neg_().to(ctx.dtypes[1])
        return loss.view_as(loss)  # as in `_gather` of the capacity dispatcher: in float64 `to` returns its input

    @staticmethod
    def backward(ctx, grad):
        length_E, direction_ED, log_p_EE, weight_E = ctx.saved_tensors
        unit_ED, centroid_ED = direction_ED
        grad_EE = log_p_EE.exp()
        grad_EE.diagonal(dim1=-2, dim2=-1).sub_(1)
        grad_EE.mul_((weight_E * (grad / ctx.temperature).unsqueeze(-1)).unsqueeze(-1))
        grad_stacked_ED = torch.stack([grad_EE @ centroid_ED, grad_EE.mT @ unit_ED])
        grad_ED, grad_sum_ED = _gradient_of_unnormalised(grad_stacked_ED, direction_ED, length_E)
        grad_ED = grad_ED.sum_to_size(ctx.shape)
        return grad_ED.to(ctx.dtypes[0]), grad_sum_ED.to(ctx.dtypes[1]), None, None


def _length(v: Tensor) -> Tensor:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=dtype).clamp_(min=1e-12)


def _gradient_of_unnormalised(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient of vectors v, given the gradient of v/|v|, `unit` = v/|v| and `length` = |v|."""
    return torch.addcmul(grad, unit, torch.linalg.vecdot(grad, unit).unsqueeze(-1), value=-1).div_(length)
