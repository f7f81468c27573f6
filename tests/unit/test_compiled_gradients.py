"""Gradients of the functions that only compiled code uses, against autograd and against their eager counterparts."""

import pytest
import torch

from megapromoe.nn.activations import CompiledGelu
from megapromoe.nn.layers import GatedResidual
from megapromoe.nn.moe.dense_experts import Biases, biases_of_images
from megapromoe.nn.moe.expert_operators import TracedExperts
from megapromoe.nn.moe.prototypes import cosine_scores, differentiable, differentiable_chosen
from megapromoe.nn.moe.row_permutations import (
    DispatchMetadata,
    RowBiases,
    add_token_sums,
    inverse_permutation,
)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_compiled_gelu_is_torchs(dtype):
    """In value and gradient; 1e19 is about the largest number whose square float32 has."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e19, -1e4, 1e4, 1e19])]).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.gelu(exact, approximate="tanh")
    limits = {"atol": 1e-6, "rtol": 1e-6} if dtype != torch.bfloat16 else {"atol": 1e-6, "rtol": 2**-8}
    value = CompiledGelu.apply(x)
    gradients = [torch.autograd.grad(y.sum(), t)[0].double() for y, t in ((value, x), (expected, exact))]
    torch.testing.assert_close(value.double(), expected, **limits)
    torch.testing.assert_close(*gradients, **limits)
    assert value.dtype == dtype


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("null", [None, 0, 2])
@pytest.mark.parametrize("by_images", [False, True])
@pytest.mark.parametrize("with_biases", [False, True])
def test_sums_of_rows(top_k, null, by_images, with_biases):
    y, rows, weight_R = values(4 + (null or 0), 3, seed=3), values(4 * top_k, 3), values(4 * top_k, seed=1)
    null_TD = None if null is None else values(null, 3, seed=4)
    bias_ED = values(3, 3, seed=5) if with_biases else None
    order_R = torch.randperm(4 * top_k, generator=torch.Generator().manual_seed(2))
    expert_R = torch.tensor([0, 0, 2, 2] * top_k).sort().values
    kept = order_R, inverse_permutation(order_R), None

    def sums(y, rows, weight_R, null_TD, bias_ED):
        biases = None if bias_ED is None else RowBiases(bias_ED, expert_R)
        metadata = DispatchMetadata(*kept, weight_R, top_k, 0, False)
        return add_token_sums(y, rows, biases, null_TD, metadata, (4, 2 if by_images else None))

    biased = rows if bias_ED is None else rows + bias_ED[expert_R]
    expected = y.index_add(0, order_R // top_k, biased * weight_R[order_R, None])
    if null_TD is not None:
        expected = expected + torch.cat([torch.zeros(4, 3), null_TD])
    inputs = y, rows, weight_R, null_TD, bias_ED
    torch.testing.assert_close(sums(*inputs), expected)
    assert torch.autograd.gradcheck(sums, inputs)


def test_sums_of_the_rows_of_a_region():
    """This rank has the rows of tokens 2 and 3 of the five that are routed; the sixth is one of a null image."""
    y, rows, weight_R, null_TD = values(6, 3, seed=3), values(2, 3), values(2, seed=1), values(1, 3, seed=4)
    order_R = torch.tensor([1, 0])

    def sums(y, rows, weight_R, null_TD):
        metadata = DispatchMetadata(order_R, order_R, None, weight_R, 1, 2, True)
        return add_token_sums(y, rows, None, null_TD, metadata, (5, None))

    expected = y.index_add(0, order_R + 2, rows * weight_R[order_R, None])
    torch.testing.assert_close(sums(y, rows, weight_R, null_TD), expected + torch.cat([torch.zeros(5, 3), null_TD]))
    assert torch.autograd.gradcheck(sums, (y, rows, weight_R, null_TD))


@pytest.mark.parametrize("bias, gelu", [(False, False), (True, False), (True, True)])
def test_experts_in_compiled_code(bias, gelu):
    """Of four experts one has no rows."""
    x, weight, bias_EF = values(6, 5), values(4, 3, 5, seed=1), values(4, 3, seed=2) if bias else None
    expert_R, end_E = torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([2, 3, 3, 6], dtype=torch.int32)

    def experts(x, weight, bias_EF):
        return TracedExperts.apply(x, weight, bias_EF, expert_R, end_E, False, False, gelu)

    expected = torch.einsum("rd,rfd->rf", x, weight[expert_R])
    expected = expected if bias_EF is None else expected + bias_EF[expert_R]
    expected = torch.nn.functional.gelu(expected, approximate="tanh") if gelu else expected
    torch.testing.assert_close(experts(x, weight, bias_EF), expected)
    assert torch.autograd.gradcheck(experts, (x, weight, bias_EF))


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
