"""A layer that is timed and counted: forward and backward on fixed tokens."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

import torch
from torch import Tensor

from megapromoe.benchmark.baseline_wrapper import Layer
from megapromoe.benchmark.counters import Counter
from megapromoe.benchmark.measure import Work
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.auxiliary import auxiliary_losses


class TimedCase:
    """Forward and backward of a layer, with the same tokens and output gradient each time."""

    def __init__(self, layer: Layer, x_BSD: Tensor, grad_BSD: Tensor, num_conditional: int):
        self.layer, self.x_BSD, self.grad_BSD, self.num_conditional = layer, x_BSD, grad_BSD, num_conditional
        self.work = Work({"forward": self.forward, "backward": self.backward}, self.prepare)
        self.outputs: list[Tensor] = []
        self._dropped: Tensor | None = None

    @property
    def dropped(self) -> float:
        """Share of the rows of the last run that were dropped, 0 to 1."""
        return 0.0 if self._dropped is None else float(self._dropped)

    def prepare(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x_BSD.grad = None
        self.outputs = []

    def forward(self) -> None:
        if isinstance(self.layer, Mlp):
            self.outputs = [self.layer(self.x_BSD)]
            return
        y_BSD, auxiliary = self.layer(self.x_BSD, self.num_conditional)
        self.outputs = [y_BSD, *auxiliary_losses([auxiliary]).values()]
        self._dropped = auxiliary.dropped

    def backward(self) -> None:
        backward(self.outputs, [self.grad_BSD])

    def run_untimed(self) -> None:
        """Runs forward and backward once."""
        self.prepare()
        self.forward()
        self.backward()
        self.prepare()

    def counted(self, necessary: int) -> dict[str, Any]:
        """Runs once and counts: "counts" by `counts_as_json`, "memory" in bytes without gradients of parameters."""
        self.prepare()
        if on_gpu := self.x_BSD.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with Counter() as counter:
            self.forward()
            kept_at = counter.mark()
            counter.phase("backward")
            self.backward()
        gradients = [p.grad for p in self.layer.parameters() if p.grad is not None]
        memory = {"kept": counter.live(at=kept_at), "peak": counter.live(without=gradients)}
        if on_gpu:
            gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
            memory["allocator_peak"] = torch.cuda.max_memory_allocated() - before - gradient_bytes
        memory["necessary"] = necessary
        self.prepare()
        return {"counts": counts_as_json(counter), "memory": memory}


def backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Runs the backward of outputs: the first with the given gradients, the others, which are losses, with ones."""
    gradients = gradients + [torch.ones_like(loss) for loss in outputs[len(gradients) :]]
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])


def counts_as_json(counter: Counter) -> dict[str, Any]:
    """All counts of a counter: phase -> name -> number."""
    phases = counter.phases | {"total": counter.total}
    return {
        phase: {name: dict(value) if isinstance(value, Tally) else value for name, value in vars(counts).items()}
        for phase, counts in phases.items()
    }
