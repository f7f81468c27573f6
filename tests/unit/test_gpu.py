"""The MoE layer on a GPU: no waits of the host, capture in a CUDA graph, both implementations of experts."""

import pytest
import torch

from megapromoe.benchmark.baselines import make_contender
from megapromoe.benchmark.layer import Settings, first_layer
from megapromoe.config.resolve import resolve
from megapromoe.nn.moe.auxiliary import auxiliary_losses
from megapromoe.nn.moe.prototypes import cosine_scores, differentiable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HAS_GROUPED = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)

BF16, FP32 = torch.bfloat16, torch.float32  # grouped experts if the GPU has the kernel; always looped experts
DROPLESS, CAPACITY = "model.capacity_factor=0", "model.capacity_factor=1.25"


def layer(*overrides: str, dtype=BF16, routing: str = "real"):
    """A layer of ProMoE-S, tokens of 8 images (2 of them null), and a gradient of the output."""
    settings = Settings(torch.device("cuda"), dtype, 1, 1, 8, (), null=0.25)
    moe, x_BSD = first_layer(resolve("promoe_s", overrides=overrides), routing, settings)
    grad_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(1)).to(x_BSD)
    return moe.train(), x_BSD, grad_BSD, settings.num_conditional


def outcome(moe, x_BSD, grad_BSD, conditional) -> list[torch.Tensor]:
    """Output, the contrastive loss, and the gradients of tokens and parameters."""
    leaves = [x_BSD, *moe.parameters()]
    y_BSD, auxiliary = moe(x_BSD, conditional)
    (loss,) = auxiliary_losses([auxiliary]).values()
    gradients = torch.autograd.grad([y_BSD, loss], leaves, [grad_BSD, torch.ones_like(loss)])
    return [y_BSD.detach(), loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("dispatch", [DROPLESS, CAPACITY])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_never_waits_for_the_gpu(dispatch, top_k, dtype):
    """Looped experts of the dropless dispatcher wait for an event after their row counts; this mode allows that."""
    case = layer(dispatch, f"model.top_k={top_k}", dtype=dtype)
    outcome(*case)  # constant tables are copied to the GPU once
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(*case)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dispatch, dtype", [(DROPLESS, BF16), (CAPACITY, BF16), (CAPACITY, FP32)])
def test_a_layer_is_captured_in_a_graph(dispatch, dtype):
    """A replay with other tokens and another routing computes what the layer computes."""
    if dispatch == DROPLESS and not HAS_GROUPED:
        pytest.skip(
            "needs compute capability 9 or 10: looped experts of the dropless dispatcher wait for their row counts"
        )
    moe, x_BSD, grad_BSD, conditional = layer(dispatch, dtype=dtype)
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        for _ in range(3):
            outcome(moe, x_BSD, grad_BSD, conditional)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(moe, x_BSD, grad_BSD, conditional)
    with torch.no_grad():
        x_BSD.copy_(x_BSD.flip(0).roll(5, dims=1) * 1.5)
    graph.replay()
    for result, expected in zip(captured, outcome(moe, x_BSD, grad_BSD, conditional), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype, limit", [(BF16, 2e-2), (FP32, 1e-4)])
@pytest.mark.parametrize("routing", ["real", "skewed"])
def test_experts_are_the_loop(routing, dtype, limit):
    moe, *rest = layer(routing=routing, dtype=dtype)
    for result, expected in zip(outcome(moe, *rest), outcome(make_contender("loop", moe), *rest), strict=True):
        torch.testing.assert_close(result, expected, rtol=limit, atol=limit * expected.abs().max().item())


@pytest.mark.parametrize("top_k", [1, 2])
def test_routers_multiply_bfloat16_tokens_as_precisely_as_float32_ones(top_k):
    """Scores, sums of tokens and gradients, against the same tokens and prototypes in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 250, 384, generator=generator, device="cuda").to(BF16).requires_grad_()
    prototypes = torch.randn(12, 384, generator=generator, device="cuda").to(BF16).requires_grad_()
    weights = torch.randn(4, 250, 12, generator=generator, device="cuda")

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, prototypes)]
        scores = cosine_scores(*leaves)
        score, sums, counts = differentiable(*leaves, scores, chosen)
        loss = (score * weights).sum() + sums.square().sum() / 1e4
        return [score.detach(), sums.detach(), counts, *torch.autograd.grad(loss, leaves)]

    chosen = cosine_scores(x.double(), prototypes.double()).score.topk(top_k, dim=-1).indices
    limits = (1e-6, 1e-6, 0, 3e-3, 3e-3)  # gradients are rounded to bfloat16
    for result, exact, limit in zip(results(BF16), results(torch.float64), limits, strict=True):
        assert (result.double() - exact).norm() <= limit * exact.norm()
