"""Biases that balance the load of experts: the choice, the weights, the update, and what they must not go with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.router_cases import E, S, config_of, filled, tokens
from support.trajectory import small
from torch.nn import functional as F

from megapromoe.config.model_options import BIASED_ROUTERS, ROUTERS, UNROUTED
from megapromoe.config.options import ConfigError
from megapromoe.conversion.state import ConversionError, check_published, model_shapes
from megapromoe.nn import BalanceBiases, LayerError, MoE
from megapromoe.nn.moe.layer import ROUTERS as CLASSES

RATE = 0.01


def biased(router: str = "promoe", **changes):
    """A router with random biases, so large that they decide about many tokens."""
    module = filled(CLASSES[router](config_of(router=router, balance_bias=RATE, rcl_weight=0.0, **changes)))
    module.balance_bias.copy_(0.3 * torch.randn(E, generator=torch.Generator().manual_seed(5)))
    return module.train()


def scores_of(module, x):
    if hasattr(module, "gate"):
        return F.linear(x, module.gate).softmax(-1)
    return F.cosine_similarity(x.unsqueeze(-2), module.prototypes, dim=-1)


def test_biases_start_at_zero_and_no_bias_is_no_state():
    for router in BIASED_ROUTERS:
        assert CLASSES[router](config_of(router=router, balance_bias=RATE)).balance_bias.tolist() == [0.0] * E
        assert "balance_bias" not in CLASSES[router](config_of(router=router)).state_dict()
    names = model_shapes(small("model.balance_bias=0.01").model)[1]
    assert {name: shape for name, shape in names.items() if "balance_bias" in name} == {
        f"blocks.{block}.mlp.router.balance_bias": (4,) for block in (1, 3)
    }


@pytest.mark.parametrize("router", BIASED_ROUTERS)
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("images", [0, 3])
def test_a_bias_changes_the_choice_and_not_the_weights(router, K, images):
    """Outputs and gradients against a loop over tokens."""
    module, x = biased(router, top_k=K), tokens(images).requires_grad_()
    assignment = module(x).assignment
    chosen, weights, differ = [], [], 0
    for score_E in scores_of(module, x).flatten(0, 1):
        best = (score_E.detach() + module.balance_bias).argsort(descending=True)[:K]
        differ += best.tolist() != score_E.argsort(descending=True)[:K].tolist()
        chosen += best.tolist()
        weights.append(score_E[best])
    assert assignment.expert_R.tolist() == chosen and (differ > images * S // 5 or not images)
    expected = torch.cat([*weights, x.new_zeros(0)])
    torch.testing.assert_close(assignment.weight_R, expected)
    if images:
        pull = torch.linspace(-1, 1, len(expected))
        leaves = [x, *module.parameters()]
        ours, theirs = (torch.autograd.grad(w @ pull, leaves) for w in (assignment.weight_R, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def layers(count: int = 2) -> torch.nn.ModuleList:
    options = {"hidden_size": 16, "num_experts": E, "top_k": 2, "balance_bias": RATE}
    return torch.nn.ModuleList([MoE(**options) for _ in range(count)])


def test_the_update_is_one_step_of_the_sign_of_the_error():
    """Over micro-batches, with an expert at the mean and layers of different load; none without tokens."""
    moes = layers()
    biases = BalanceBiases(moes)
    loads = torch.tensor([[[4.0, 0, 2, 3, 1], [0, 0, 10, 0, 0]], [[2.0, 4, 2, 0, 2], [0, 0, 0, 0, 0]]])
    for load_ME in loads:
        biases.add(load_ME)
    biases.update()
    # Loads (6, 4, 4, 3, 3) and (0, 0, 10, 0, 0): the means are 4 and 2.
    expected = RATE * torch.tensor([[-1.0, 0, 0, 1, 1], [1, 1, -1, 1, 1]])
    assert torch.equal(torch.stack([moe.router.balance_bias for moe in moes]), expected)
    biases.update()  # no micro-batch since
    biases.add(torch.zeros(2, E))  # all null
    biases.update()
    assert torch.equal(torch.stack([moe.router.balance_bias for moe in moes]), expected)
    biases.add(loads[0])
    biases.update(applied=torch.tensor(False))
    assert torch.equal(torch.stack([moe.router.balance_bias for moe in moes]), expected)
    biases.update()  # the load of the skipped step is not counted later
    assert torch.equal(torch.stack([moe.router.balance_bias for moe in moes]), expected)


def test_large_loads_are_counted_exactly():
    """3 · 2^24 + 1 rows: in float32 the experts would seem to have equal loads."""
    (moe,) = layers(1)
    biases, load_ME = BalanceBiases(layers_of := torch.nn.ModuleList([moe])), torch.full((1, E), 2.0**24)
    for _ in range(3):
        biases.add(load_ME)
    biases.add(torch.tensor([[1.0, 0, 0, 0, 0]]))
    biases.update()
    assert layers_of[0].router.balance_bias.tolist() == pytest.approx([-RATE, RATE, RATE, RATE, RATE])


def test_skewed_tokens_become_even():
    """Tokens around one direction all prefer the same experts."""
    (moe,) = layers(1)
    filled(moe)
    x = tokens(8) + 2.0 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    biases, loads = BalanceBiases(moe), []
    for _ in range(150):
        _, auxiliary = moe.train()(x)
        biases.add([auxiliary])
        biases.update()
        loads.append(auxiliary.load_E)
    rows = float(loads[0].sum())
    assert loads[0].max() > 2 * rows / E and loads[-1].max() < 1.25 * rows / E and loads[-1].min() > 0.75 * rows / E


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in BIASED_ROUTERS])
def test_other_routers_refuse_a_bias(router):
    with pytest.raises(ConfigError, match=r"model\.balance_bias = 0\.1: must be 0 with model\.router"):
        small(f"model.router={router}", "model.balance_bias=0.1")
    if router not in UNROUTED:
        with pytest.raises(LayerError, match=r"balance_bias = 0\.1: must be 0"):
            MoE(hidden_size=8, num_experts=4, router=router, balance_bias=0.1)


def test_wrong_layers_are_named():
    with pytest.raises(ValueError, match="the load of 1 layers: 2 layers have a balance bias"):
        BalanceBiases(layers()).add(torch.zeros(1, E))
    other = MoE(hidden_size=16, num_experts=3, balance_bias=RATE)
    with pytest.raises(ValueError, match=r"\[3, 5\] experts"):
        BalanceBiases(torch.nn.ModuleList([*layers(1), other]))
    nothing = BalanceBiases(MoE(hidden_size=16, num_experts=3))
    nothing.add(torch.zeros(1, 3))
    nothing.update()
    assert not nothing


def test_published_files_have_no_biases():
    config = small()
    check_published(config, Path("x.pth"))
    with pytest.raises(ConversionError, match=r"does not support model\.balance_bias = 0\.01"):
        check_published(replace(config, model=replace(config.model, balance_bias=0.01)), Path("x.pth"))
