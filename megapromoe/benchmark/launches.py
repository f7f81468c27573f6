"""Counts what the host issues in a training step: operators by phase and name, eager or compiled.

The model has the depth of a preset and a small width, because no count depends on the width. Operators run on real CPU
tensors, experts as grouped products, in bf16 under ZeRO-1. One after the other are counted the model alone, and the
same under DeepSpeed; the difference is DeepSpeed's share.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megapromoe.benchmark.counters import FLOPS, is_kernel
from megapromoe.benchmark.layer import Settings
from megapromoe.benchmark.lowered import LoweringBackend
from megapromoe.benchmark.models import Batch
from megapromoe.benchmark.moved_bytes import minimum_moved, moved_bytes
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.engine import fused_update
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.compile import compile_model
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe import dispatcher, expert_linear
from megapromoe.nn.moe.auxiliary import auxiliary_losses
from megapromoe.nn.parallelize import build

IMAGES, NULL_SHARE = 8, 1 / 8
MODELS = ("promoe_s", "promoe_l", "promoe_xl", "dit_xl")
# A head has 4 channels; an image 16 tokens.
NARROW = ("model.input_size=8", "data.source=synthetic", "train.deepspeed=bf16_zero1")


@dataclass
class Issued:
    """What the host issues in one phase.

    Attributes:
        operators: name -> calls of operators that compute or copy, each of which launches a kernel or more.
        fused: calls of kernels that the compiler generated.
        moved: bytes that elementwise operators, reductions and copies read and write; not those of products and
            attention.
        messages: collectives.
    """

    operators: Tally = field(default_factory=Tally)
    fused: int = 0
    moved: int = 0
    messages: int = 0

    @property
    def launches(self) -> int:
        """Operators and generated kernels."""
        return self.operators.total() + self.fused

    def without(self, other: Issued) -> Issued:
        """What was issued besides `other`."""
        return Issued(
            self.operators - other.operators,
            self.fused - other.fused,
            self.moved - other.moved,
            self.messages - other.messages,
        )


class IssueCounter(TorchDispatchMode):
    """Counts operators by phase, also around compiled code, whose own operators `backend` counts."""

    def __init__(self, backend: LoweringBackend | None = None):
        super().__init__()
        self.backend = backend
        self.phases: dict[str, Issued] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Torch skips compiled code within other modes."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """The same for torch 2.13 and later."""
        return True

    def phase(self, name: str) -> None:
        """Starts the phase `name`."""
        self._close()
        self.now = self.phases[name] = Issued()
        self._before = self.backend.issued if self.backend else None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._close()

    def _close(self) -> None:
        if self.phases and self.backend and self._before:
            self.now.operators += self.backend.issued.calls - self._before.calls
            self.now.fused += self.backend.issued.fused - self._before.fused
            self.now.moved += self.backend.issued.moved - self._before.moved
            self.now.messages += self.backend.issued.messages - self._before.messages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.now.messages += 1
            return out
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if is_kernel(func, outputs):
            self.now.operators[func._schema.name.partition("::")[2]] += 1
            if func._overloadpacket not in FLOPS and func._overloadpacket not in flop_registry:
                self.now.moved += moved_bytes(func, args, kwargs or {}, outputs)
        return out


def narrow(preset: str, *overrides: str, width: int = 4) -> Config:
    """The configuration of a preset with heads of `width` channels."""
    heads = resolve(preset, overrides=["data.source=synthetic"]).model.heads
    return resolve(preset, overrides=[*NARROW, f"model.hidden_size={width * heads}", *overrides])


def count_step(config: Config, mesh: Mesh, compiled: bool = False, images: int = IMAGES) -> dict[str, Issued]:
    """Counts a training step after a first one. Collective, in a torch.distributed job.

    Returns phase -> what is issued: "forward", "loss" and "backward" of the model alone; "deepspeed forward" and
    "deepspeed backward", what DeepSpeed adds to them; "norm" of the gradients, "update" by DeepSpeed and AdamW, "ema".
    A fused update includes the averages, and "ema" is nothing.
    """
    batch = _batch(config, images)
    backend = LoweringBackend(batch.num_conditional) if compiled else None
    alone = count_model(config, mesh, backend, images)
    with grouped_experts():
        engine = Engine(_model(config, mesh, backend).train(), config, mesh)
        try:
            under = _count_engine(engine, batch, config, backend)
        finally:
            engine.close()
    for name in ("forward", "backward"):
        alone[f"deepspeed {name}"] = under[name].without(alone[name])
    return alone | {name: under[name] for name in ("norm", "update", "ema")}


def count_model(
    config: Config, mesh: Mesh, backend: LoweringBackend | None = None, images: int = IMAGES
) -> dict[str, Issued]:
    """Counts "forward", "loss" and "backward" of the model alone, in bf16, after a first pass. Collective.

    `backend`: compiles the model; None: eager.
    """
    batch = _batch(config, images)
    with grouped_experts():
        return _count_passes(_model(config, mesh, backend).bfloat16().train(), batch, backend)


def count_update(config: Config, mesh: Mesh, images: int = IMAGES) -> dict[str, Issued]:
    """Counts "norm", "update" and "ema" of a step of an eager model after a first one. Collective."""
    with grouped_experts():
        engine = Engine(_model(config, mesh, None).train(), config, mesh)
        try:
            under = _count_engine(engine, _batch(config, images), config, None)
        finally:
            engine.close()
    return {name: under[name] for name in ("norm", "update", "ema")}


def _batch(config: Config, images: int) -> Batch:
    return Batch(config, Settings(torch.device("cpu"), torch.float32, 1, 1, images, (), null=NULL_SHARE))


def _model(config: Config, mesh: Mesh, backend: LoweringBackend | None) -> DiT:
    model = build(config, mesh)
    if backend:
        torch._dynamo.reset()  # torch limits how often it compiles a function, and every model is another one
        compile_model(model, backend)
    return model


def _count_passes(model: DiT, batch: Batch, backend: LoweringBackend | None) -> dict[str, Issued]:
    inputs = _inputs(batch)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with IssueCounter(backend) as counter:
            counter.phase("forward")
            prediction, auxiliary = model(*inputs)
            counter.phase("loss")
            loss = batch.loss_of(prediction, auxiliary)
            counter.phase("backward")
            loss.backward()
    return counter.phases


def _count_engine(engine: Engine, batch: Batch, config: Config, backend: LoweringBackend | None) -> dict[str, Issued]:
    inputs = _inputs(batch)
    ema = EMA(engine, config.train.ema_decays[:1])
    counter: IssueCounter
    is_fused = config.train.adamw_backend == "fused"
    call = "step_by_partitions" if is_fused else "step"
    update = getattr(engine._backend, call)
    backend = backend or LoweringBackend(batch.num_conditional)
    functions = fused_update.compile_functions(backend, dynamic=False)

    def marked_update(*arguments: Any) -> None:
        counter.phase("update")
        update(*arguments)

    def loss(prediction: Tensor, auxiliary: Any) -> tuple[Tensor, Tensor]:
        counter.phase("loss")
        total = batch.loss_of(prediction, auxiliary)
        counter.phase("backward")
        return total, total.detach()

    with (
        patch.object(engine._backend, call, marked_update),
        patch.object(fused_update, "compiled_functions", lambda: functions),
    ):
        for _ in range(2):
            with IssueCounter(backend) as counter:
                counter.phase("forward")
                report = engine.micro_step(*inputs, loss=loss)
                counter.phase("norm")
                result = engine.step(1e-4, report)
                counter.phase("ema")
                ema.update(result)
    return counter.phases


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
    x_BCHW, t_B = batch.objective.corrupt(batch.clean, batch.noise, batch.u_B)
    return x_BCHW, t_B, batch.labels_B, batch.num_conditional


def count_blocks(compiled: bool, images: int = IMAGES) -> dict[str, dict[str, float]]:
    """Bytes that the elementwise operators of a dense and of an MoE block move, forward and backward.

    Returns "dense" and "moe" -> "forward", "backward" and "minimum" (`minimum_moved`, of both together), each in
    activations: D bf16 numbers for each token. ProMoE-S with two heads, 64 tokens an image.
    """
    config = resolve(
        "promoe_s", overrides=[*NARROW[1:], "model.input_size=16", "model.heads=2", "model.hidden_size=256"]
    )
    m, batch = config.model, _batch(config, images)
    x_BSD = torch.randn(images, m.tokens, m.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    c_BD = torch.randn(images, m.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    backend = LoweringBackend(batch.num_conditional) if compiled else None
    model = _model(config, UNSHARDED, backend).bfloat16().train()
    share, figures = batch.num_conditional / images, {}
    for name, block in zip(("dense", "moe"), model.blocks, strict=False):
        with grouped_experts():
            for _ in range(2):
                model.zero_grad(set_to_none=True)  # nothing is added to earlier gradients
                x_BSD.grad = c_BD.grad = None
                with IssueCounter(backend) as counter:
                    counter.phase("forward")
                    y_BSD, auxiliary = block(x_BSD, c_BD, batch.labels_B, batch.num_conditional)
                    counter.phase("losses")
                    losses = [*auxiliary_losses([auxiliary]).values()] if auxiliary else []
                    outputs = [y_BSD, *losses]
                    gradients = [torch.ones_like(y) for y in outputs]
                    counter.phase("backward")
                    torch.autograd.backward(outputs, gradients)
        unit = x_BSD.numel() * x_BSD.element_size()
        figures[name] = {phase: counter.phases[phase].moved / unit for phase in ("forward", "backward")}
        figures[name]["minimum"] = sum(sum(pair) for pair in minimum_moved(m, name, share).values())
    return figures


def grouped_experts() -> ExitStack:
    """Within it experts use grouped products on a CPU, as on GPUs that have them."""
    stack = ExitStack()
    yes: Callable[[Tensor], bool] = lambda x: True  # noqa: E731
    for module in (dispatcher, expert_linear):
        stack.enter_context(patch.object(module, "has_grouped_mm_kernel", yes))
    return stack
