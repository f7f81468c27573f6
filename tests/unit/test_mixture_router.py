"""The Gaussian-mixture router against a loop over tokens and components."""

import math

import pytest
import torch
from support.router_cases import D, E, S, config_of, tokens

from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.nn.moe.mixture_router import MixtureRouter


def mixture(variance: str, K: int, skewed: bool = False, **changes) -> MixtureRouter:
    """Components of unlike variance and weight; `skewed`: the last one is so far away that it gets no token."""
    config = config_of(router="gmm", mixture_variance=variance, top_k=K, **{"mixture_weight": 0.5, **changes})
    router = ROUTERS["gmm"](config)
    generator = torch.Generator().manual_seed(3)
    for parameter in router.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    if skewed:
        router.means.data[-1] = 40.0
        router.log_mixing.data[0] = 3.0
    return router.train()


def by_hand(router: MixtureRouter, x: torch.Tensor) -> tuple[list, torch.Tensor, torch.Tensor]:
    """The experts of each token, their weights, and the loss, from one density at a time."""
    mixing = router.log_mixing.softmax(0)

    def log_joint(token):
        values = []
        for e in range(E):
            log_variance_D = router.log_variances[e].expand(D)
            distance_D = (token - router.means[e]).square() / log_variance_D.exp()
            values.append(mixing[e].log() - 0.5 * (distance_D + log_variance_D + math.log(2 * math.pi)).sum())
        return torch.stack(values)

    chosen, weights, likelihoods = [], [], []
    for token in x.flatten(0, 1):
        posterior = log_joint(token).softmax(0)
        best = log_joint(token.detach()).detach().argsort(descending=True)[: router.config.top_k]
        chosen += best.tolist()
        weights.append(posterior[best])
        likelihoods.append(log_joint(token.detach()).exp().sum().log() / D)
    loss = -0.5 * torch.stack(likelihoods).mean() if likelihoods else x.sum() * 0
    return chosen, torch.cat([*weights, x.new_zeros(0)]), loss


@pytest.mark.parametrize("variance, K, images, skewed", [
    ("diagonal", 1, 2, False), ("diagonal", 2, 1, True), ("isotropic", 2, 1, False), ("isotropic", 1, 0, False),
])  # fmt: skip
def test_choice_weights_loss_and_gradients(variance, K, images, skewed):
    router, x = mixture(variance, K, skewed), tokens(images).double().requires_grad_()
    router.double()
    routed = router(x)
    chosen, weights, loss = by_hand(router, x)
    assert routed.assignment.expert_R.tolist() == chosen and routed.assignment.top_k == K
    assert routed.load_E.tolist() == [chosen.count(e) for e in range(E)]
    assert not skewed or (E - 1 not in chosen and chosen.count(0) > images * S / 2)
    torch.testing.assert_close(routed.assignment.weight_R, weights)
    torch.testing.assert_close(routed.losses["mixture"], loss)
    leaves, pull = [x, *router.parameters()], torch.linspace(-1, 1, len(weights)).double()
    ours = torch.autograd.grad(routed.assignment.weight_R @ pull + routed.losses["mixture"], leaves)
    theirs = torch.autograd.grad(weights @ pull + loss, leaves, materialize_grads=True, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_moves_the_mixture_and_not_the_tokens():
    """Descent fits means and variances of two far groups of tokens; the gradient of the tokens is zero."""
    router, groups = mixture("diagonal", 1, mixture_weight=1.0), torch.tensor([-3.0, 3.0]).repeat_interleave(5)
    x = (tokens(10) * 0.5 + groups[:, None, None]).requires_grad_()
    before = router(x).losses["mixture"]
    (gradient,) = torch.autograd.grad(before, x, allow_unused=True)
    assert gradient is None or not gradient.any()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        router(x.detach()).losses["mixture"].backward()
        optimizer.step()
    routed = router(x)
    # Of the normal density with σ = 0.5, and a bit for the group.
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.25) + math.log(2) / D
    assert before > 2 * expected and float(routed.losses["mixture"].detach()) == pytest.approx(expected, abs=0.1)
    experts = routed.assignment.expert_R.view(10, S)
    assert not set(experts[:5].flatten().tolist()) & set(experts[5:].flatten().tolist())


def test_no_loss_in_eval_mode_or_without_weight():
    assert not mixture("diagonal", 1).eval()(tokens(1)).losses
    assert not mixture("diagonal", 1, mixture_weight=0.0)(tokens(1)).losses
    with_balance = mixture("diagonal", 1, balance_weight=0.1)(tokens(2)).losses
    assert set(with_balance) == {"mixture", "balance"}
