"""Measures whole models: a training step, and sampling with guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.benchmark.baseline_wrapper import BaselineWrapper, CannotRun
from megapromoe.benchmark.baselines import make_contender
from megapromoe.benchmark.counters import Counter
from megapromoe.benchmark.layer import BenchmarkError, Settings, dense_model
from megapromoe.benchmark.measure import Work, interleave, make_clock, summary
from megapromoe.benchmark.routing_patterns import PlannedChoice, planned_counts
from megapromoe.benchmark.timed_case import counts_as_json
from megapromoe.benchmark.updates import FusedUpdate, Update, make_update
from megapromoe.config.options import Config
from megapromoe.diffusion.objectives import make_objective
from megapromoe.diffusion.samplers import Labels, guided, sample
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.nn.compile import compile_model
from megapromoe.nn.dit import AuxiliaryOutput, DiT
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import PrototypeRouter, RouterOutput
from megapromoe.nn.parallelize import build
from megapromoe.planning import cost


def measure_step(config: Config, routing: str, settings: Settings) -> dict:
    """Measures a training step (forward with loss, backward, clipped AdamW) of each contender's model on one batch.

    It is a plain loop in this process, without engine and ZeRO. In bf16 the optimizer updates fp32 masters. With
    `settings.compile` the update is compiled like the models (`engine/fused_update.py`), else it is torch's. With
    `settings.capture` the step is one phase, a CUDA graph. Contenders with our parameters share one copy of them, of
    their gradients and of the optimizer's states. Returns JSON like `layer.measure_layer`, without parts.
    """
    batch = Batch(config, settings)
    updates: dict[frozenset, Update | FusedUpdate] = {}

    def step(model: DiT) -> Work:
        model.train()
        key = frozenset(id(p) for p in model.parameters())
        if key not in updates:
            updates[key] = make_update(model, config.train, settings.compile)
        update = updates[key]
        loss: list[Tensor] = []

        def forward() -> None:
            loss.append(batch.loss(model))

        return Work(
            {"forward": forward, "backward": lambda: loss.pop().backward(), "update": update.step},
            lambda: model.zero_grad(set_to_none=True),
        )

    per_image = {True: cost.flops_per_image(dense_model(config.model)), False: cost.flops_per_image(config.model)}
    figures = _measure(config, routing, settings, step, lambda dense: per_image[dense].training)
    return figures | {"images": settings.images}


def measure_sample(config: Config, routing: str, settings: Settings) -> dict:
    """Measures sampling by Euler's method with guidance, where half of the images are null. Returns JSON as above."""
    m = config.model
    generator = torch.Generator().manual_seed(settings.seed)
    labels_B = torch.randint(m.num_classes, (settings.images,), generator=generator).to(settings.device)
    noise = torch.randn(settings.images, m.in_channels, m.input_size, m.input_size, generator=generator)
    noise = noise.to(settings.device)

    def sampling(model: DiT) -> Work:
        model.eval()

        def run() -> None:
            labels = Labels(labels_B, m.null_class)
            predict = guided(model, labels, settings.guidance, two_calls=m.images_depend_on_batch)
            sample(predict, noise, "euler", settings.sample_steps)

        return Work({"sample": run})

    passes = settings.sample_steps * (1 if settings.guidance == 1 else 2)
    per_image = {True: cost.flops_per_image(dense_model(m)), False: cost.flops_per_image(m)}
    figures = _measure(config, routing, settings, sampling, lambda dense: passes * per_image[dense].forward)
    return figures | {"images": settings.images, "sample_steps": settings.sample_steps, "guidance": settings.guidance}


def _measure(
    config: Config,
    routing: str,
    settings: Settings,
    make: Callable[[DiT], Work],
    flops_per_image: Callable[[bool], int],
) -> dict[str, Any]:
    works, timed, dropped, cannot = {}, {}, {}, {}
    if settings.compile:
        torch.compiler.reset()  # torch limits how often a process compiles a function, and every case has other models
    ours = build(config, UNSHARDED).to(settings.device, settings.dtype)
    for name in settings.contenders:
        try:
            model = _model(name, ours, config, routing)
            if settings.compile:
                compile_model(model)
            planned = _PlannedRouting(model, partial(settings.pattern, routing))
            works[name] = make(model)
            with _dropped_by(model) as dropped[name]:
                _run(works[name])  # raises if the contender cannot run
            planned.check()
            timed[name] = _captured(works[name]) if settings.capture else works[name]
        except (CannotRun, torch.OutOfMemoryError) as error:
            cannot[name] = {"cannot": str(error).splitlines()[0]}
            works.pop(name, None)
    samples = interleave(timed, settings.rounds, make_clock(settings.device, settings.threads))
    figures = summary(samples, reference="dense")
    for name, work in works.items():
        figures[name]["flops"] = {"useful": flops_per_image(name == "dense") * settings.images}
        figures[name]["dropped"] = sum(map(float, dropped[name])) / max(len(dropped[name]), 1)
        figures[name] |= _counted(work, settings.device)
    return {"contenders": figures | cannot, "tokens": settings.images * config.model.tokens}


@contextmanager
def _dropped_by(model: DiT) -> Iterator[list[Tensor]]:
    """Collects the share of rows that each call of a baseline's layer dropped during the block."""
    dropped: list[Tensor] = []

    def record(_module: nn.Module, _args: tuple, output: tuple[Tensor, MoEAuxiliary]) -> None:
        if output[1].dropped is not None:
            dropped.append(output[1].dropped)

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, BaselineWrapper)]
    yield dropped
    for handle in handles:
        handle.remove()


def _captured(work: Work) -> Work:
    """The phases as one, a CUDA graph that is replayed. Raises CannotRun if the host reads from the device."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # gradients must not have been accumulated on another stream than the captured one
        _run(work)
    torch.cuda.current_stream().wait_stream(stream)
    work.prepare()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own
    try:
        with torch.cuda.graph(graph):
            for run in work.phases.values():
                run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CannotRun(f"no CUDA graph can be captured: {str(error).splitlines()[0]}") from error
    return Work({"step": graph.replay})


def _run(work: Work) -> None:
    work.prepare()
    for run in work.phases.values():
        run()


def _counted(work: Work, device: torch.device) -> dict[str, Any]:
    work.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Compiled code cannot be counted, so this run is eager.
    with torch.compiler.set_stance("force_eager"), Counter() as counter:
        for name, run in work.phases.items():
            counter.phase(name)
            run()
    counter.phases = {name: counter.phases[name] for name in work.phases}
    memory = {"peak": counter.live()}
    if device.type == "cuda":
        memory["allocator_peak"] = torch.cuda.max_memory_allocated()
    return {"counts": counts_as_json(counter), "memory": memory}


def _model(name: str, ours: DiT, config: Config, routing: str) -> DiT:
    """The model with the contender's layers. "dense" is a new model, others share all parameters of `ours`."""
    weight = ours.x_embedder.proj.weight
    device, dtype = weight.device, weight.dtype
    if name == "dense":
        return build(replace(config, model=dense_model(config.model)), UNSHARDED).to(device, dtype)
    if name.startswith("deepspeed") and routing != "real":
        raise CannotRun("DeepSpeed's gate cannot follow a planned routing inside a model; use --routing real")
    shared = {id(t): t for t in chain(ours.parameters(), ours.buffers())}
    model = copy.deepcopy(ours, shared)  # new modules around the same tensors
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp = make_contender(name, block.mlp)
    return model


class _PlannedRouting:
    """Makes the routers of a model follow a planned routing, and records the loads of their experts.

    Args:
        pattern_of: the pattern of an MoE layer.
    """

    def __init__(self, model: DiT, pattern_of: Callable[[int], str]):
        self.loads: dict[nn.Module, list[int]] = {}
        self.patterns: dict[nn.Module, str] = {}
        self.handles = []
        routers = [module for module in model.modules() if isinstance(module, PrototypeRouter)]
        for layer, module in enumerate(routers):
            if (pattern := pattern_of(layer)) != "real":
                router: Any = module  # a method of the instance is replaced
                router.choose, self.patterns[module] = PlannedChoice(module, pattern), pattern
                self.handles.append(module.register_forward_hook(self._record))

    def _record(self, router: nn.Module, _args: tuple, routed: RouterOutput) -> None:
        self.loads[router] = [int(rows) for rows in routed.load_E]

    def check(self) -> None:
        """Stops recording. Raises BenchmarkError if the loads were not as planned."""
        for handle in self.handles:
            handle.remove()
        for router, load in self.loads.items():
            pattern = self.patterns[router]
            if load != (planned := planned_counts(pattern, sum(load), len(load))):
                raise BenchmarkError(f"{pattern} routing: experts got {load} tokens, planned were {planned}")


class Batch:
    """A batch of random latents, labels, noise and times, conditional images first."""

    def __init__(self, config: Config, settings: Settings):
        m, B = config.model, settings.images
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (B, m.in_channels, m.input_size, m.input_size)
        self.clean, self.noise = (torch.randn(shape, generator=generator).to(settings.device) for _ in range(2))
        self.u_B = torch.rand(B, generator=generator).clamp(1e-3, 1 - 1e-3).to(settings.device)
        labels_B = torch.randint(m.num_classes, (B,), generator=generator)
        labels_B[settings.num_conditional :] = m.null_class
        self.labels_B = labels_B.to(settings.device)
        self.num_conditional = settings.num_conditional
        self.objective = make_objective(config)

    def loss(self, model: DiT) -> Tensor:
        """The training loss, as in `training.loop`."""
        x_BCHW, t_B = self.objective.corrupt(self.clean, self.noise, self.u_B)
        return self.loss_of(*model(x_BCHW, t_B, self.labels_B, self.num_conditional))

    def loss_of(self, prediction: Tensor, auxiliary: AuxiliaryOutput) -> Tensor:
        """The training loss of the model's output for this batch."""
        return self.objective.loss(prediction, self.clean, self.noise, self.u_B) + auxiliary.total()
