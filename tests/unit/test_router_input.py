"""`model.router_input`: routers score the modulated tokens, as published, or the normalised ones before modulation."""

from copy import deepcopy

import pytest
import torch
from support.router_cases import D, E, filled, tokens

from megapromoe.config.resolve import resolve
from megapromoe.conversion.starting_weights import _expert_problems
from megapromoe.nn import ROUTERS, MoE, auxiliary_loss
from megapromoe.nn.moe.layer import auxiliary_of
from megapromoe.nn.parallelize import build

LABELS = torch.tensor([0, 3, 1000])


def layer_of(router: str) -> MoE:
    return filled(MoE(hidden_size=D, num_experts=E, router=router)).train()


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_process_x_and_routers_score_the_other_tokens(router):
    """Rows, weights and losses are those of the router on the other tokens; outputs are of x; gradients likewise."""
    x, scored = tokens(3, seed=1).requires_grad_(), tokens(3, seed=2).requires_grad_()
    layer = layer_of(router)
    other, third = deepcopy(layer), deepcopy(layer)  # centroids of k-means move
    y, auxiliary = layer(x, 2, LABELS, router_input=scored)
    (y.square().sum() + auxiliary_loss([auxiliary])).backward()

    images = 3 if other.unconditional is None else 2
    plain_x, plain_scored = (t.detach().clone().requires_grad_() for t in (x, scored))
    routed = other.router(plain_scored[:images], LABELS[:images])
    expected, _ = other.run_experts(plain_x, routed.assignment, images)
    torch.testing.assert_close(y, expected)
    assert torch.equal(auxiliary.load_E, routed.load_E)
    _, from_x = third.route(x.detach(), 2, LABELS)
    assert not torch.equal(from_x.mean_weight, auxiliary.mean_weight), "the router scores x"

    (expected.square().sum() + auxiliary_loss([auxiliary_of(routed, None)])).backward()
    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(scored.grad, plain_scored.grad)
    assert scored.grad.abs().sum() > 0
    if images == 2:
        assert not scored.grad[2].any(), "null images are not routed"


def test_the_same_tokens_are_the_default():
    x = tokens(3)
    (y, auxiliary), (y_same, same) = (layer_of("promoe")(x, 2, LABELS, router_input=r) for r in (None, x))
    assert torch.equal(y, y_same) and torch.equal(auxiliary.load_E, same.load_E)
    assert torch.equal(auxiliary_loss([auxiliary]), auxiliary_loss([same]))


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"router_input has the shape \(2, 9, 16\): must be that of x, \(3, 9, 16\)"):
        layer_of("promoe")(tokens(3), 2, LABELS, router_input=tokens(2))


def test_scores_do_not_depend_on_shift_and_scale():
    """Another shift in the block of an MoE layer: unmodulated, the routing weights of the layer stay."""
    weights = {}
    for router_input in ("modulated", "unmodulated"):
        config = resolve("digits", overrides=[f"model.router_input={router_input}", "model.depth=2"])
        model = build(config).eval()
        filled(model)
        x, labels = tokens(1).new_ones(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
        x = x + torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        for change in (0.0, 3.0):
            bias = model.blocks[1].adaLN_modulation[1].bias
            with torch.no_grad():
                bias[3 * 64 : 4 * 64].add_(change)  # the shift of the MLP's input
                weights[router_input, change] = model(x, torch.full((4,), 500.0), labels, 4)[1].weight_M
    assert torch.equal(weights["unmodulated", 0.0], weights["unmodulated", 3.0])
    assert not torch.equal(weights["modulated", 0.0], weights["modulated", 3.0])


def test_a_run_does_not_start_from_weights_of_the_other_input():
    old, new = (resolve("digits", overrides=[f"model.router_input={i}"]).model for i in ("modulated", "unmodulated"))
    assert ["router_input" in problem for problem in _expert_problems(old, new)] == [True]
    assert not list(_expert_problems(old, old))
