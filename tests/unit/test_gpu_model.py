"""A whole model on a GPU: a training step captured in a CUDA graph, and compiled blocks."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from megapromoe.benchmark.layer import Settings
from megapromoe.benchmark.models import Batch
from megapromoe.benchmark.routing_patterns import PlannedChoice
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.nn.compile import compile_model
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.routers import PrototypeRouter
from megapromoe.nn.parallelize import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
HAS_GROUPED = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)

BF16, FP32 = torch.bfloat16, torch.float32
DROPLESS, CAPACITY = "model.capacity_factor=0", "model.capacity_factor=1.25"
IMAGES = 8


def small_model(*overrides: str, dtype: torch.dtype) -> tuple[DiT, Batch]:
    """A ProMoE-S of four blocks with a final layer that is not zero, and a batch of 8 images, 2 of them null."""
    config = resolve("promoe_s", overrides=("model.depth=4", *overrides))
    model = build(config, UNSHARDED).to(DEVICE, dtype).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or name.startswith("final_layer"):  # they start at zero
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, batch_of(config, seed=0)


def batch_of(config, seed: int, null: float = 0.25) -> Batch:
    return Batch(config, Settings(DEVICE, FP32, 1, 1, IMAGES, (), null=null, seed=seed))


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    """The norm of the difference is at most `limit` times the norm of what is expected, tensor by tensor."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()).clamp_min(1e-30)
        assert error <= limit, f"tensor {number} of shape {tuple(a.shape)}: {error:.1e}"


class CapturableStep:
    """A training step whose batch is copied into fixed memory, and whose optimizer reads no number on the host."""

    def __init__(self, model: DiT, batch: Batch):
        self.model, self.batch = model, batch
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True, capturable=True)

    def twin(self) -> "CapturableStep":
        """Another step in the same state."""
        other = CapturableStep(copy.deepcopy(self.model), copy.deepcopy(self.batch))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def load(self, batch: Batch) -> None:
        for name in ("clean", "noise", "u_B", "labels_B"):
            getattr(self.batch, name).copy_(getattr(batch, name))

    def run(self) -> torch.Tensor:
        """Forward, backward, clipping and AdamW; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.batch.loss(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("dispatch, dtype", [(DROPLESS, BF16), (CAPACITY, BF16), (CAPACITY, FP32)])
def test_a_training_step_is_captured_in_a_graph(dispatch, dtype):
    """Replays on other data, and so with other routing, train as the same steps without a graph do."""
    if dispatch == DROPLESS and not HAS_GROUPED:
        pytest.skip("needs compute capability 9 or 10: looped experts of the dropless dispatcher wait for row counts")
    model, batch = small_model(dispatch, dtype=dtype)
    step = CapturableStep(model, batch)
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(warmup)
    eager = step.twin()
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured_loss = step.run()
    config = resolve("promoe_s", overrides=("model.depth=4",))
    losses = []
    for seed in (1, 2, 3):
        data = batch_of(config, seed)
        step.load(data)
        eager.load(data)
        graph.replay()
        assert_near([captured_loss], [eager.run()], 1e-3)
        losses.append(captured_loss.item())
    assert len(set(losses)) == 3
    assert_near(step.parameters, eager.parameters, 1e-3)


def test_compiled_blocks_are_the_eager_ones():
    """In float32, with looped experts, for every number of null images; without a second compilation."""
    model, _ = small_model(dtype=FP32)
    follow_plan(model)
    compiled = compiled_copy(model)
    graphs = set()
    with without_tf32():
        for null in (0.25, 0.0, 1.0, 0.125):
            batch = batch_of(model_config(), seed=3, null=null)
            assert_near(gradients(compiled, batch), gradients(model, batch), 1e-3)
            graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1


@pytest.mark.skipif(not HAS_GROUPED, reason="needs compute capability 9 or 10")
def test_compiled_grouped_blocks_are_as_precise_as_eager_ones():
    """In bf16 with grouped experts, one of which has no tokens; no wait of the host, no second compilation."""
    model, _ = small_model(dtype=BF16)
    follow_plan(model)
    reference = copy.deepcopy(model).float()
    follow_plan(reference)
    compiled = compiled_copy(model)
    graphs = set()
    for null in (0.25, 0.0, 1.0, 0.125):
        batch = batch_of(model_config(), seed=3, null=null)
        with without_tf32():
            expected = gradients(reference, batch)
        for a, b, exact in zip(gradients(compiled, batch), gradients(model, batch), expected, strict=True):
            assert (a.double() - exact).norm() <= 1.5 * (b.double() - exact).norm() + 1e-4 * exact.double().norm()
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.loss(compiled).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def model_config():
    return resolve("promoe_s", overrides=("model.depth=4",))


def follow_plan(model: DiT) -> None:
    """Makes the routers choose experts by a skewed plan, so that rounding cannot change a choice."""
    for module in model.modules():
        if isinstance(module, PrototypeRouter):
            module.choose = PlannedChoice(module, "skewed")


def compiled_copy(model: DiT) -> DiT:
    compiled = copy.deepcopy(model)
    follow_plan(compiled)
    counters.clear()
    compile_model(compiled)
    return compiled


def gradients(model: DiT, batch: Batch) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter; zero for those that the loss does not depend on."""
    model.zero_grad(set_to_none=True)
    loss = batch.loss(model)
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within it convolutions and products in float32 are computed in float32."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
