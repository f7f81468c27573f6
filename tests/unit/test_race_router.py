"""The router of Expert Race against a loop over pairs of a token and an expert."""

import pytest
import torch
from support.router_cases import E, S, config_of, filled, tokens
from torch.nn import functional as F

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.nn import MoE, auxiliary_loss
from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.nn.moe.race_router import RaceRouter, SimilarityInputs

DECAY, WEIGHT = 0.75, 0.3


def race(K: int = 1, **changes) -> RaceRouter:
    settings = {"threshold_decay": DECAY, "router_similarity_weight": WEIGHT, **changes}
    return filled(ROUTERS["race"](config_of(router="race", top_k=K, **settings))).train()


def logits_by_hand(router: RaceRouter, x: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(x.flatten(0, 1) @ router.projection.T + router.projection_bias)
    return hidden @ router.gate.T + router.gate_bias


def similarity_by_hand(logit_TE: torch.Tensor, chosen: set) -> torch.Tensor:
    T, P = len(logit_TE), logit_TE.softmax(-1)
    together = [[sum((t, i) in chosen and (t, j) in chosen for t in range(T)) for j in range(E)] for i in range(E)]
    diagonal = sum(together[i][i] for i in range(E))
    pairs = sum(together[i][j] for i in range(E) for j in range(E) if i != j)
    total = logit_TE.sum() * 0
    for i in range(E):
        for j in range(E):
            if i == j:
                weight = E * together[i][i] / diagonal if diagonal else 0
            else:
                weight = (E**2 - E) * together[i][j] / pairs if pairs else 0
            total = total + weight * sum(P[t, i] * P[t, j] for t in range(T)) / max(T, 1)
    return WEIGHT * total


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("K, images, skewed", [(1, 2, False), (2, 1, True), (1, 0, False)])
def test_choice_weights_losses_and_gradients(gate, K, images, skewed):
    """Of a batch, of tokens that all prefer two experts so that others get none, and of no image."""
    router, x = race(K, score_function=gate), tokens(images).requires_grad_()
    if skewed:
        router.gate_bias.data[:2] = 30.0 if gate == "identity" else 8.0
    routed = router(x)
    logit_TE = logits_by_hand(router, x)
    score_TE = {"identity": logit_TE, "sigmoid": logit_TE.sigmoid(), "softmax": logit_TE.softmax(-1)}[gate]
    pairs = sorted(((t, e) for t in range(images * S) for e in range(E)), key=lambda p: -float(score_TE[p].detach()))
    chosen = set(pairs[: images * S * K])
    rows = list(zip(routed.assignment.token_R.tolist(), routed.assignment.expert_R.tolist(), strict=True))
    assert set(rows) == chosen and len(rows) == len(chosen)
    load = [sum(e == expert for _, e in chosen) for expert in range(E)]
    assert routed.load_E.tolist() == load
    assert not (skewed and gate != "softmax") or load[2:] == [0] * (E - 2)
    smallest = float(score_TE[pairs[len(chosen) - 1]].detach()) if chosen else 0.0
    assert float(router.threshold) == pytest.approx((1 - DECAY) * smallest, rel=1e-5, abs=1e-7)

    weights = torch.stack([score_TE[row] for row in rows]) if rows else x.new_zeros(0) + score_TE.sum()
    inputs = routed.joint_losses["similarity"]
    (loss,) = SimilarityInputs.joint_loss([inputs])
    expected = similarity_by_hand(logit_TE, chosen)
    torch.testing.assert_close(routed.assignment.weight_R, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    leaves, pull = [x, *router.parameters()], torch.linspace(-1, 1, len(rows))
    ours = torch.autograd.grad(routed.assignment.weight_R @ pull + loss, leaves)
    theirs = torch.autograd.grad(weights @ pull + expected, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_losses_of_several_layers_are_those_of_each():
    inputs = [race(2)(tokens(2, seed)).joint_losses["similarity"] for seed in (1, 2)]
    together = SimilarityInputs.joint_loss(inputs)
    torch.testing.assert_close(together, torch.cat([SimilarityInputs.joint_loss([layer]) for layer in inputs]))
    assert inputs[0].joint_key == inputs[1].joint_key and not race(router_similarity_weight=0.0)(tokens(2)).joint_losses


def test_the_threshold_replaces_the_race_at_inference():
    """It converges to the smallest chosen score; then an image has the same experts alone as in a batch."""
    router, x = race(), tokens(4)
    for _ in range(60):
        trained = router(x)
    before = router.threshold.clone()
    routed = router.eval()(x)
    assert torch.equal(router.threshold, before) and not routed.joint_losses
    assert abs(len(routed.assignment.token_R) - len(trained.assignment.token_R)) <= 2
    experts = [
        [e for t, e in zip(*(v.tolist() for v in routed.assignment[:2]), strict=True) if t // S == b] for b in range(4)
    ]
    assert [router(x[b : b + 1]).assignment.expert_R.tolist() for b in range(4)] == experts
    assert len({len(rows) for rows in experts}) > 1, "images may have unlike numbers of rows"


def test_a_layer_learns_to_use_all_experts():
    """The loss spreads tokens that begin at two experts."""
    torch.manual_seed(0)
    moe = MoE(hidden_size=16, num_experts=4, router="race", router_similarity_weight=1.0).train()
    moe.router.gate_bias.data[:2] = 3.0
    optimizer, x, loads = torch.optim.Adam(moe.router.parameters(), lr=0.03), torch.randn(8, 16, 16), []
    for _ in range(60):
        _, auxiliary = moe(x)
        optimizer.zero_grad()
        auxiliary_loss([auxiliary]).backward()
        optimizer.step()
        loads.append(auxiliary.load_E)
    assert int((loads[0] > 0).sum()) == 2 and int((loads[-1] > 12).sum()) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.capacity_factor=1.5"], "model.capacity_factor = 1.5: must be 0 with model.router = 'race'"),
        (["model.num_shared_experts=2"], "must be 1 with model.router = 'race', which has no shared expert"),
        (["model.top_k=5"], "model.top_k = 5: must be at most model.num_experts = 4"),
    ],
)
def test_rules(words, message):
    with pytest.raises(ConfigError, match=message):
        resolve("digits", overrides=["model.router=race", *words])
