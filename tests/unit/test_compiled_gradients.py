"""Gradients of the functions that only compiled code uses, against autograd and against their eager counterparts."""

import pytest
import torch

from megapromoe.nn.layers import GatedResidual
from megapromoe.nn.moe.dense_experts import Biases, biases_of_images
from megapromoe.nn.moe.prototypes import cosine_scores, differentiable, differentiable_chosen
from megapromoe.nn.moe.row_permutations import DispatchMetadata, inverse_permutation, token_sums


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("null_images", [0, 1, 3])
def test_a_residual_with_biases_of_images(null_images):
    x, y, gate, shared, unconditional = (values(*s) for s in ((3, 4, 5), (3, 4, 5), (3, 5), (5,), (5,)))

    def residual(x, gate, y, shared, unconditional):
        bias_BD = biases_of_images(Biases(shared, unconditional), 3 - null_images, gate)
        return GatedResidual.apply(x, gate, y, bias_BD)

    bias_BD = torch.stack([shared] * (3 - null_images) + [shared + unconditional] * null_images)
    expected = x + gate[:, None] * (y + bias_BD[:, None])
    torch.testing.assert_close(residual(x, gate, y, shared, unconditional), expected)
    assert torch.autograd.gradcheck(residual, (x, gate, y, shared, unconditional))


@pytest.mark.parametrize("top_k", [1, 2])
def test_sums_of_rows(top_k):
    rows, weight_R = values(4 * top_k, 3), values(4 * top_k, seed=1)
    order_R = torch.randperm(4 * top_k, generator=torch.Generator().manual_seed(2))
    kept = order_R, inverse_permutation(order_R), None

    def sums(rows, weight_R):
        return token_sums(rows, DispatchMetadata(*kept, weight_R, top_k, 0, False))

    expected = torch.zeros(4, 3, dtype=torch.float64).index_add(0, order_R // top_k, rows * weight_R[order_R, None])
    torch.testing.assert_close(sums(rows, weight_R), expected)
    assert torch.autograd.gradcheck(sums, (rows, weight_R))


@pytest.mark.parametrize("top_k, num_summed", [(1, 0), (1, 1), (2, 1), (3, 3)])
def test_scores_of_the_chosen_experts(top_k, num_summed):
    """Scores, sums and gradients are those of `differentiable`, of which the chosen scores are used."""
    outcomes = []
    for chosen_only in (False, True):
        x, prototype_ED = values(2, 5, 6), values(4, 6, seed=1)
        scores = cosine_scores(x, prototype_ED)
        chosen = scores.score.topk(top_k, dim=-1).indices
        if chosen_only:
            score, sum_ED, count_E = differentiable_chosen(x, prototype_ED, scores, chosen, num_summed)
        else:
            summed = chosen[..., :num_summed] if num_summed else None
            score, sum_ED, count_E = differentiable(x, prototype_ED, scores, summed)
            score = score.gather(-1, chosen)
        total = (score.sin() * torch.arange(1, top_k + 1)).sum() + (0 if sum_ED is None else sum_ED.square().sum())
        total.backward()
        outcomes.append([score, sum_ED, count_E, x.grad, prototype_ED.grad])
    for ours, theirs in zip(*reversed(outcomes), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
