"""Records the operators of a training step with their shapes and numbers, to compare steps on different data."""

from __future__ import annotations

import math
from collections import Counter as Tally
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from support.trajectory import small, stir
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megapromoe.benchmark.counters import Counter
from megapromoe.data.datasets import Synthetic
from megapromoe.data.sample_stream import Batch, SampleStream
from megapromoe.diffusion.objectives import make_objective
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.engine.step_result import StepResult
from megapromoe.nn.parallelize import build
from megapromoe.training.loop import _micro_step
from megapromoe.training.metric_accumulator import MetricAccumulator
from megapromoe.training.routing_recorder import RoutingRecorder

WARM_UP = 1  # steps before those that are compared: the optimizer makes its state in the first


class OperatorTrace(TorchDispatchMode):
    """Records each operator, below autograd: its name, and its arguments and results without the values of tensors.

    Numbers among the arguments are recorded with their values: a graph of the step would contain them.

    Attributes:
        calls: the operators.
        copies_to_host: calls of `cpu()`.
        copies_from_host: tensors made from numbers of the host. On a GPU the host waits until they are copied.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.copies_to_host = self.copies_from_host = 0
        self._functions = _CopiesToHost(self)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.copies_from_host += function is torch.ops.aten.lift_fresh.default
        self.calls.append((str(function), _described(arguments), _described(named or {}), _described(result)))
        return result


class _CopiesToHost(TorchFunctionMode):
    """Counts calls of `cpu()`, which run no operator on a tensor that is on the CPU already."""

    def __init__(self, trace: OperatorTrace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function, types, arguments=(), named=None):
        self.trace.copies_to_host += getattr(function, "__name__", "") == "cpu"
        return function(*arguments, **(named or {}))


def _described(value: Any) -> Any:
    """A value that can be compared and pickled: of tensors dtype, shape and strides, of other objects the class."""
    if isinstance(value, Tensor):
        return str(value.dtype), *value.shape, "strides", *value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if isinstance(value, (torch.dtype, torch.device, torch.layout)) else type(value).__name__


@dataclass
class TracedStep:
    """A training step.

    Attributes:
        calls: the operators.
        reads: phase, "forward" (with backward) or "update" -> operator -> how often the host reads a value or a size
            from the device; "from host": how often it copies its own numbers to the device and waits.
        null: null images in each micro-batch.
        load_ME: rows of each expert on this rank, summed over the micro-batches.
        dropped: share of this rank's rows that were dropped, mean over layers; 0 without a capacity factor.
        applied: whether the step changed the weights.
    """

    calls: list[tuple]
    reads: dict[str, dict[str, int]]
    null: list[int]
    load_ME: list[list[float]]
    dropped: float
    applied: bool


class _Observed(MetricAccumulator):
    """Also keeps what the micro-batches of a step returned."""

    def add(self, denoising, total, auxiliary):
        self.outputs.append(auxiliary)
        super().add(denoising, total, auxiliary)


def traced_steps(overrides: tuple[str, ...]) -> tuple[TracedStep, TracedStep]:
    """A step on samples of the stream, and one on equal images of one class, which all choose the same experts.

    Each is a step as `training.loop` runs it, without logging and saving. Collective.
    """
    config = small(*overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, config.parallel.expert_tp, timeout=60)
    model = build(config, mesh)
    stir(model, mesh)  # otherwise blocks would begin as the identity
    engine = Engine(model, config, mesh)
    ema, accumulator = EMA(engine, config.train.ema_decays), _Observed(config, mesh, torch.device("cpu"))
    data = config.data
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    stream = SampleStream(
        Synthetic(shape, config.model.num_classes, data.size, seed=1),
        data.seed,
        data.condition_dropout,
        data.flip,
        config.model.null_class,
        dropout_stratum=data.condition_dropout_stratum,
    )
    objective, traced = make_objective(config), []
    for number in range(WARM_UP + 2):
        layout = mesh.dp.size, mesh.dp.rank, config.train.accumulation, config.train.global_batch
        batches = [stream.batch(part.start, len(part)) for part in stream.micro_batches(number, *layout)]
        if number == WARM_UP + 1:
            batches = [skewed(batch, config.model.null_class) for batch in batches]
        if number < WARM_UP:
            _step(engine, ema, objective, accumulator, batches)
        else:
            traced.append(_traced(engine, ema, objective, accumulator, batches))
    engine.close()
    return traced[0], traced[1]


def skewed(batch: Batch, null_class: int) -> Batch:
    """The batch with equal images at equal times, and one class."""
    constant = torch.full_like(batch.clean_BCHW, 50.0)
    labels_B = batch.labels_B.where(batch.labels_B == null_class, 3)
    return replace(batch, clean_BCHW=constant, noise_BCHW=-constant, u_B=batch.u_B * 0 + 0.2, labels_B=labels_B)


def _step(engine, ema, objective, accumulator, batches: list[Batch], before_update=lambda: None) -> StepResult:
    loss = torch.zeros(())
    accumulator.outputs = []
    recorder = RoutingRecorder(engine.config, engine.mesh, Path("unused"))  # of a run that records nothing
    for number, batch in enumerate(batches):
        loss += _micro_step(engine, objective, batch, accumulator, recorder)
        if number < len(batches) - 1:
            engine.finish_micro_step()
    before_update()
    result = engine.step(1e-3, loss, stop=False, max_norm=math.inf, save=False)
    accumulator.end_step(result.applied_on_device)
    ema.update(result)
    return result


def _traced(engine, ema, objective, accumulator, batches: list[Batch]) -> TracedStep:
    waits = {"forward": Tally(), "update": Tally()}

    def end_phase(name: str) -> None:
        copies = Tally({"cpu": trace.copies_to_host, "from host": trace.copies_from_host})
        waits[name] = counter.phases[name].waits + copies
        trace.copies_to_host = trace.copies_from_host = 0

    def before_update() -> None:
        end_phase("forward")
        counter.phase("update")

    with Counter() as counter, OperatorTrace() as trace:
        result = _step(engine, ema, objective, accumulator, batches, before_update)
    end_phase("update")
    outputs = accumulator.outputs
    return TracedStep(
        calls=trace.calls,
        reads={name: dict(tally) for name, tally in waits.items() if tally},
        null=[len(batch) - batch.num_conditional for batch in batches],
        load_ME=sum(output.load_ME for output in outputs).tolist(),
        dropped=0.0 if outputs[0].dropped_M is None else float(outputs[0].dropped_M.mean()),
        applied=result.applied,
    )


def difference(a: TracedStep, b: TracedStep) -> str:
    """The first operator in which two steps differ; empty if they are the same."""
    for number, (ours, theirs) in enumerate(zip_longest(a.calls, b.calls)):
        if ours != theirs:
            return f"operator {number} of {len(a.calls)} and {len(b.calls)}: {ours} and {theirs}"
    return ""
