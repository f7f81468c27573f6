"""What only a GPU can show of the MoE layer: no wait for it, capture in a CUDA graph, the grouped products in bf16."""

import pytest
import torch

from megapromoe.benchmark.contenders import contender
from megapromoe.benchmark.layer import Settings, first_layer
from megapromoe.config import resolve

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0: on others torch's grouped_mm asks for the sizes of the groups",
)

FACTORS = [0.0, 1.25]  # dropless, and boxes of one size


def layer(*overrides: str, routing: str = "real"):
    """A layer of ProMoE-S in bf16, tokens of 8 images (2 of them null), and a gradient of the output."""
    settings = Settings(torch.device("cuda"), torch.bfloat16, 1, 1, 8, (), null=0.25)
    moe, x_BSD = first_layer(resolve("promoe_s", overrides=overrides), routing, settings)
    grad_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(1)).to(x_BSD)
    return moe.train(), x_BSD, grad_BSD, settings.conditional


def outcome(moe, x_BSD, grad_BSD, conditional) -> list[torch.Tensor]:
    """Output, the contrastive loss, and the gradients of tokens and parameters."""
    leaves = [x_BSD, *moe.parameters()]
    routed = moe.route(x_BSD, conditional)
    y_BSD, (loss,) = moe(x_BSD, routed, conditional), moe.losses_of([routed]).values()
    gradients = torch.autograd.grad([y_BSD, loss], leaves, [grad_BSD, torch.ones_like(loss)])
    return [y_BSD.detach(), loss.detach(), *gradients]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_never_waits_for_the_gpu(factor, top_k):
    case = layer(f"model.capacity_factor={factor}", f"model.top_k={top_k}")
    outcome(*case)  # tables are copied there once
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(*case)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_layer_is_captured_in_a_graph(factor):
    """Played again with other tokens, routed otherwise, it does what the layer does."""
    moe, x_BSD, grad_BSD, conditional = layer(f"model.capacity_factor={factor}")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            outcome(moe, x_BSD, grad_BSD, conditional)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(moe, x_BSD, grad_BSD, conditional)
    with torch.no_grad():
        x_BSD.copy_(x_BSD.flip(0).roll(5, dims=1) * 1.5)
    graph.replay()
    for found, expected in zip(captured, outcome(moe, x_BSD, grad_BSD, conditional), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("routing", ["real", "skewed"])
def test_grouped_products_are_the_loop(routing):
    moe, *rest = layer(routing=routing)
    for found, expected in zip(outcome(moe, *rest), outcome(contender("loop", moe), *rest), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
