"""Routers and the MoE layer against the formulas, token by token: any K, score function, loss and ablation."""

import math
from dataclasses import replace

import pytest
import torch
from support.router_cases import D, E, S, config_of, filled, tokens
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.moe import prototypes as prototypes_module
from megapromoe.nn.moe.assignment import top_counts
from megapromoe.nn.moe.auxiliary import auxiliary_loss, auxiliary_losses
from megapromoe.nn.moe.layer import ROUTERS, MoE, auxiliary_of, mlps_of
from megapromoe.nn.moe.prototypes import contrastive_loss, cosine_scores, differentiable


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def weight_of(gate: str, scores: list[float], expert: int) -> float:
    if gate == "identity":
        return scores[expert]
    if gate == "sigmoid":
        return 1 / (1 + math.exp(-scores[expert]))
    return math.exp(scores[expert]) / sum(map(math.exp, scores))


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("K", [1, 2, E])
def test_prototype_routing(gate, K):
    router, x = filled(ROUTERS["promoe"](config_of(score_function=gate, top_k=K))), tokens(3)
    assignment = router(x).assignment
    rows = list(zip(*(tensor.tolist() for tensor in assignment[:3]), strict=True))
    expected = []
    for t, token in enumerate(x.view(-1, D)):
        scores = [cosine(token, p) for p in router.prototypes.detach()]
        best = sorted(range(E), key=lambda e: -scores[e])[:K]
        expected += [(t, e, weight_of(gate, scores, e)) for e in best]
    assert [r[:2] for r in rows] == [r[:2] for r in expected]
    torch.testing.assert_close(torch.tensor([r[2] for r in rows]), torch.tensor([r[2] for r in expected]))
    # Not renormalised: a token's weights do not add up to one.
    if gate == "softmax" and K < E:
        assert assignment.weight_R.view(-1, K).sum(1).max() < 0.999


@pytest.mark.parametrize("rcl_tokens", ["all", "first"])
@pytest.mark.parametrize("K", [1, 3])
def test_contrastive_loss_by_hand(rcl_tokens, K):
    config = config_of(top_k=K, rcl_tokens=rcl_tokens, rcl_weight=2.0, rcl_temperature=0.3)
    router, x = filled(ROUTERS["promoe"](config)), tokens(2)
    routed = router.train()(x)
    chosen = routed.assignment.expert_R.view(-1, K)
    counted = chosen if rcl_tokens == "all" else chosen[:, :1]
    means = {}
    for e in range(E):
        chosen_by = [x.view(-1, D)[t] for t in range(len(counted)) if e in counted[t].tolist()]
        if chosen_by:
            means[e] = torch.stack(chosen_by).mean(0)
    used = sorted(means)
    assert len(used) >= 2
    logits = torch.stack(
        [torch.stack([F.cosine_similarity(router.prototypes[i], means[j], dim=0) for j in used]) for i in used]
    )
    expected = 2.0 * F.cross_entropy(logits / 0.3, torch.arange(len(used)))
    (loss,) = auxiliary_losses([auxiliary_of(routed, None)])["rcl"]
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, router.prototypes, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, router.prototypes)[0])


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 7, 0]])
def test_contrastive_loss_is_zero_with_fewer_than_two_experts(counts):
    prototypes = torch.randn(3, D, requires_grad=True)
    sums = (torch.randn(3, D) * torch.tensor(counts)[:, None]).requires_grad_()
    loss = contrastive_loss(prototypes, sums, torch.tensor(counts).float(), 0.07)
    loss.backward()
    assert loss == 0 and not prototypes.grad.any() and not sums.grad.any()


def test_contrastive_loss_leaves_unused_experts_out():
    prototypes, sums = torch.randn(4, D), torch.randn(4, D)
    counts = torch.tensor([3.0, 0.0, 2.0, 5.0])
    used = [0, 2, 3]
    expected = contrastive_loss(prototypes[used], sums[used], counts[used], 0.2)
    torch.testing.assert_close(contrastive_loss(prototypes, sums, counts, 0.2), expected)


def multiply_without_copies(monkeypatch) -> None:
    """Makes routers compute as on a GPU, where bfloat16 tokens are multiplied as they are."""
    monkeypatch.setattr(prototypes_module, "has_exact_product", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(prototypes_module, "_exact_product", lambda a, b: a.float() @ b.float())


def test_a_product_with_bfloat16_tokens_is_nearly_that_of_float32(monkeypatch):
    multiply_without_copies(monkeypatch)
    a, b = torch.randn(5, 300), torch.randn(300, 7).to(torch.bfloat16)
    exact = a.double() @ b.double()
    assert (prototypes_module.product(a, b) - exact).norm() < 2e-5 * exact.norm()
    assert (a.to(torch.bfloat16).double() @ b.double() - exact).norm() > 5e-4 * exact.norm()


@pytest.mark.parametrize("K", [0, 1, 2])
@pytest.mark.parametrize("dtype, copies", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("count", [4, 0])
def test_cosine_scores_and_their_gradients_are_the_formula(K, dtype, copies, count, monkeypatch):
    """Against autograd of cosine_similarity and index_add, for tokens that chose some prototypes and not others."""
    if not copies:
        multiply_without_copies(monkeypatch)
    x = tokens(count).to(dtype).requires_grad_()
    prototypes = torch.randn(E, D, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    leaves, scores = (x, prototypes), cosine_scores(x, prototypes)
    chosen = scores.score[..., :-1].topk(K, dim=-1).indices if K else None  # no token chooses the last prototype
    score, sums, numbers = differentiable(x, prototypes, scores, chosen)
    assert not scores.score.requires_grad and score.requires_grad
    expected = F.cosine_similarity(x.float().unsqueeze(-2), prototypes.float(), dim=-1)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    ours, theirs = (score * weights).sum(), (expected * weights).sum()
    if K:
        chosen = chosen.flatten()
        rows = x.float().flatten(0, 1).repeat_interleave(K, 0)
        sums_expected = torch.zeros(E, D).index_add(0, chosen, rows)
        torch.testing.assert_close(sums, sums_expected, rtol=1e-5, atol=1e-5)
        assert numbers.tolist() == chosen.bincount(minlength=E).tolist()
        ours, theirs = ours + (sums**2).sum(), theirs + (sums_expected**2).sum()
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours, leaves)
    limit = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(gradients, torch.autograd.grad(theirs, leaves), strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a, b, **limit)


@pytest.mark.parametrize("counts", [[3, 0, 2, 5], [1, 1, 1, 1], [0, 0, 4, 0], [0, 0, 0, 0]])
def test_contrastive_loss_has_the_gradients_of_the_formula(counts):
    """Of several images at once, with used and unused experts, against autograd of the used ones."""
    g = torch.Generator().manual_seed(4)
    prototypes = torch.randn(4, D, generator=g).requires_grad_()
    count_BE = torch.tensor([counts, [2, 1, 0, 1]]).float()
    sums = (torch.randn(2, 4, D, generator=g) * (count_BE > 0)[..., None]).requires_grad_()
    expected = torch.zeros(2)
    for b in range(2):
        used = count_BE[b].nonzero()[:, 0]
        if len(used) > 1:
            logits = F.cosine_similarity(prototypes[used].unsqueeze(1), sums[b, used].unsqueeze(0), dim=-1) / 0.1
            expected = expected.index_put((torch.tensor(b),), F.cross_entropy(logits, torch.arange(len(used))))
    ours, pull = contrastive_loss(prototypes, sums, count_BE, 0.1), torch.tensor([1.0, -2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours @ pull, (prototypes, sums))
    for a, b in zip(gradients, torch.autograd.grad(expected @ pull, (prototypes, sums)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "router, gate",
    [("promoe", "identity"), ("promoe", "sigmoid"), ("promoe", "softmax"), ("promoe_linear", ""), ("tc", "")],
)
@pytest.mark.parametrize("form", ["batch", "sequence"])
def test_balance_losses_by_hand(router, gate, form):
    """P is the routing weight if that is a softmax, otherwise the softmax of the routing weights."""
    config = config_of(router=router, top_k=2, balance_weight=0.5, balance_form=form, rcl_weight=0.0)
    config = replace(config, score_function=gate or config.score_function)
    module, x = filled(ROUTERS[router](config)).train(), tokens(4)
    routed = module(x)
    raw = module.scores(x).score if router == "promoe" else F.linear(x, module.gate)
    raw = raw.sigmoid() if gate == "sigmoid" else raw
    p, chosen = raw.softmax(-1), routed.assignment.expert_R.view(4, S, 2)

    def balance(p, chosen):
        f = torch.tensor([E * float((chosen == e).sum()) / chosen.numel() for e in range(E)])
        return 0.5 * (p.reshape(-1, E).mean(0) * f).sum()

    per_image = [balance(p[b], chosen[b]) for b in range(4)]
    expected = balance(p, chosen) if form == "batch" else torch.stack(per_image).mean()
    torch.testing.assert_close(routed.losses["balance"], expected)


@pytest.mark.parametrize("router", ["promoe_ec", "ec"])
def test_expert_choice_takes_the_best_tokens_of_each_image(router):
    module, x = filled(ROUTERS[router](config_of(router=router, top_k=2))), tokens(3)
    assignment = module(x).assignment
    scores = module.scores(x).score if router == "promoe_ec" else F.linear(x, module.gate).softmax(-1)
    tokens_per_expert = int(S / E * 2)
    taken = set(zip(assignment.token_R.tolist(), assignment.expert_R.tolist(), strict=True))
    expected = {
        (b * S + t, e)
        for b in range(3)
        for e in range(E)
        for t in sorted(range(S), key=lambda t: -scores[b, t, e].item())[:tokens_per_expert]
    }
    assert taken == expected and len(assignment.token_R) == len(expected)


@pytest.mark.parametrize("experts", [12, 40])
def test_expert_choice_with_fewer_tokens_than_experts(experts):
    """As published, each expert then takes the one token of an image that is most like its prototype."""
    config = config_of(router="promoe_ec", num_experts=experts)
    module, x = filled(ROUTERS["promoe_ec"](config)).train(), tokens(3)
    routed = module(x)
    best_BE = F.cosine_similarity(x.unsqueeze(2), module.prototypes, dim=-1).argmax(1)
    assert routed.assignment.token_R.view(3, experts).sub(torch.arange(3)[:, None] * S).tolist() == best_BE.tolist()
    assert routed.losses["rcl"].isfinite() and routed.load_E.tolist() == [3] * experts


@pytest.mark.parametrize("experts", [20, 80])
def test_diffmoe_with_fewer_tokens_than_experts(experts):
    """It chooses over the batch, which has 4 · 9 tokens: each of 20 experts takes one, each of 80 at least one."""
    config = config_of(router="diffmoe", num_experts=experts)
    module, x = filled(ROUTERS["diffmoe"](config)).train(), tokens(4)
    assert module(x).load_E.tolist() == [1] * experts
    kth = module.predictor(x.view(-1, D)).sigmoid().max(0).values
    torch.testing.assert_close(module.threshold, 0.05 * kth.detach())


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "softmax"])
def test_the_weights_of_prototype_expert_choice(gate):
    """A softmax is over the tokens of the image, from which an expert chooses, not over experts."""
    module = filled(ROUTERS["promoe_ec"](config_of(router="promoe_ec", score_function=gate, top_k=2)))
    x = tokens(3)
    rows = zip(*(tensor.tolist() for tensor in module(x).assignment[:3]), strict=True)
    for token, expert, weight in rows:
        image, place = divmod(token, S)
        over_tokens = [cosine(other, module.prototypes[expert].detach()) for other in x[image]]
        assert weight == pytest.approx(weight_of(gate, over_tokens, place), rel=1e-5)
    assert module(x[:0]).assignment.weight_R.shape == (0,)


def test_diffmoe_updates_its_thresholds():
    module, x = filled(ROUTERS["diffmoe"](config_of(router="diffmoe"))), tokens(4)
    routed = module.train()(x)
    count = int(4 * S / E)
    assert routed.load_E.tolist() == [count] * E
    kth = module.predictor(x.view(-1, D)).sigmoid().sort(dim=0, descending=True).values[count - 1]
    torch.testing.assert_close(module.threshold, 0.05 * kth.detach())
    for _ in range(200):
        module(x)
    torch.testing.assert_close(module.threshold, kth.detach(), rtol=1e-3, atol=1e-4)
    # At inference an expert takes as many tokens as predicted, in this test about as many as in training.
    assert (module.eval()(x).load_E - count).abs().max() <= 1


def test_top_counts():
    score = torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.3, 0.7]])
    taken = top_counts(score, torch.tensor([2, 0]))
    assert taken.tolist() == [[False, False], [True, False], [True, False]]


# ---- the layer


def by_hand(moe: MoE, x, conditional: int, config: ModelConfig):
    """Output = shared(x) + Σ weight·expert(x), or shared(x) + unconditional(x)."""

    def mlp(layer, token):
        hidden = F.gelu(F.linear(token, layer.fc1.weight, layer.fc1.bias), approximate="tanh")
        return F.linear(hidden, layer.fc2.weight, layer.fc2.bias)

    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for s in range(S):
            token = x[b, s]
            for shared in mlps_of(moe.shared):
                out[b, s] += mlp(shared, token)
            if b >= conditional and moe.unconditional is not None:
                for unconditional in mlps_of(moe.unconditional):
                    out[b, s] += mlp(unconditional, token)
                continue
            score_E = torch.stack([token @ p / (token.norm() * p.norm()) for p in moe.router.prototypes])
            weights = {"identity": score_E, "sigmoid": score_E.sigmoid(), "softmax": score_E.softmax(0)}
            weight_E = weights[config.score_function]
            for e in score_E.argsort(descending=True).tolist()[: config.top_k]:
                hidden = F.linear(token, moe.experts.fc1.weight[e], moe.experts.fc1.bias[e])
                y = F.linear(F.gelu(hidden, approximate="tanh"), moe.experts.fc2.weight[e], moe.experts.fc2.bias[e])
                out[b, s] += weight_E[e] * y
    return out


@pytest.mark.parametrize("conditional", [0, 2, 3])
@pytest.mark.parametrize("shared, unconditional", [(1, 1), (1, 0), (0, 1), (0, 0), (3, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("K", [1, 2])
def test_moe_layer_by_hand(K, shared, unconditional, conditional):
    """Output and every gradient, with tokens split as in a block; the outputs of several experts are summed."""
    config = config_of(
        top_k=K,
        shared_expert=shared > 0,
        num_shared_experts=max(shared, 1),
        shared_expert_width=7 if shared == 3 else 0,
        unconditional_expert=unconditional > 0,
        num_unconditional_experts=max(unconditional, 1),
    )
    moe, x = filled(MoE.from_config(config)), tokens(3).requires_grad_()
    leaves = [x, *moe.parameters()]
    y, _ = moe(x, conditional)
    expected = by_hand(moe, x, conditional, config)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.linspace(-1, 1, y.numel()).view_as(y)
    ours = torch.autograd.grad(y, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("conditional", [0, 3])
def test_every_parameter_stays_in_the_graph(router, conditional):
    """All parameters get a gradient from a batch of null images only, or without any: ZeRO would hang without one."""
    config = config_of(router=router, balance_weight=0.0 if router == "kmeans" else 0.1)
    moe, x = filled(MoE.from_config(config)).train(), tokens(3)
    y, auxiliary = moe(x, conditional, torch.tensor([0, 1, config.null_class]))
    (y.sum() + auxiliary_loss([auxiliary])).backward()
    missing = [name for name, p in moe.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in moe.parameters())
