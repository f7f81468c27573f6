"""Measures one MoE layer, forward and backward in training mode: time, FLOPs, memory, and the time of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from megapromoe.benchmark.baseline_wrapper import CannotRun, dense_experts, prototypes_of
from megapromoe.benchmark.baselines import make_contender
from megapromoe.benchmark.measure import Samples, Work, interleave, make_clock, spread, summary
from megapromoe.benchmark.routing_patterns import (
    RECORDED,
    bias_tokens_towards,
    planned_counts,
    planned_experts,
    recorded_pattern,
)
from megapromoe.benchmark.timed_case import TimedCase, backward
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import Config, ratio_of
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.errors import UserError
from megapromoe.nn.block import Block
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.auxiliary import auxiliary_losses
from megapromoe.nn.moe.expert_linear import ExpertOffsets
from megapromoe.nn.moe.layer import MoE, auxiliary_of
from megapromoe.nn.parallelize import build
from megapromoe.planning import cost


class BenchmarkError(UserError):
    """A measurement that would be wrong, or could not be compared with those of the same folder."""


@dataclass(frozen=True)
class Settings:
    """How all cases are measured.

    Attributes:
        device, dtype: of models and tokens.
        threads: of the CPU.
        rounds: timed runs of each contender.
        images: of a micro-batch.
        contenders: names of `baselines.CONTENDERS`.
        null: share of the images without a class, 0 to 1; their number is rounded.
        seed: of weights and tokens.
        sample_steps, guidance: of the sampler.
        compile: torch.compile of all models in training. Counts are taken without it.
        capture: training steps, compiled, are captured in a CUDA graph, and its replay is measured.
        recorded: rows of each expert of each MoE layer that the routing "recorded" replays; empty without a trace.
        recorded_layer: which of these layers the measurements of one layer replay.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    rounds: int
    images: int
    contenders: tuple[str, ...]
    null: float = 0.1
    seed: int = 0
    sample_steps: int = 4
    guidance: float = 1.5
    compile: bool = False
    capture: bool = False
    recorded: tuple[tuple[int, ...], ...] = ()
    recorded_layer: int = 0

    def pattern(self, routing: str, layer: int | None = None) -> str:
        """The pattern of a routing in an MoE layer of a model; None: in a layer that is measured alone."""
        if routing != RECORDED:
            return routing
        return recorded_pattern(self.recorded[self.recorded_layer if layer is None else layer])

    @property
    def num_conditional(self) -> int:
        """Images with a class."""
        return self.images - round(self.images * self.null)


def measure_layer(config: Config, routing: str, settings: Settings) -> dict:
    """Measures one case: every contender on the same tokens with one routing, and the parts of our layer.

    Args:
        config: of a ProMoE by token choice, which determines size and number of experts.
        routing: one of `routing_patterns.ROUTINGS`, or RECORDED.
        settings: how to measure.

    Returns JSON: "contenders" name -> figures, or {"cannot": reason}; "parts" of our layer, see `parts_summary`; "load"
    tokens of each expert; "tokens" of the batch. Raises BenchmarkError if the load is not the planned one.
    """
    torch.manual_seed(settings.seed)
    moe, x_BSD = first_layer(config, routing, settings)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    grad_BSD = torch.randn(x_BSD.shape, generator=generator).to(x_BSD)
    timed, cannot = {}, {}
    for name in settings.contenders:
        try:
            layer = make_contender(name, moe).train()
            timed[name] = TimedCase(layer, x_BSD, grad_BSD, settings.num_conditional)
            timed[name].run_untimed()
        except (CannotRun, torch.OutOfMemoryError) as error:
            cannot[name] = {"cannot": str(error).splitlines()[0]}
            timed.pop(name, None)
    load = check_load(moe, x_BSD, settings.pattern(routing), settings.num_conditional)
    works = {name: case.work for name, case in timed.items()}
    if "ours" in timed:
        works |= _parts(moe, x_BSD, grad_BSD, settings.num_conditional)
    samples = interleave(works, settings.rounds, make_clock(settings.device, settings.threads))

    figures = summary({name: samples[name] for name in timed}, reference="dense")
    for name, case in timed.items():
        useful = layer_flops(config.model, dense=name == "dense") * settings.images
        figures[name] |= {"flops": {"useful": 3 * useful}, "dropped": case.dropped}
        memory = necessary_bytes(config.model, settings, x_BSD.element_size(), dense=name == "dense")
        figures[name] |= case.counted(memory)
    result: dict[str, Any] = {"contenders": figures | cannot, "load": load, "tokens": x_BSD[..., 0].numel()}
    if "ours" in timed:
        result["parts"] = parts_summary(samples)
    return result


def first_layer(config: Config, routing: str, settings: Settings, mesh: Mesh = UNSHARDED) -> tuple[MoE, Tensor]:
    """The first MoE layer of an initialised model, and input tokens (B, S, D) for it, those of null images last."""
    m = config.model
    config = replace(config, model=replace(m, depth=2, moe_every=2))
    model = build(config, mesh)
    moe = model.get_submodule("blocks.1.mlp")
    if not isinstance(moe, MoE):
        raise BenchmarkError(f"model.router = {m.router!r}: has no experts to measure; use a model with experts")
    generator = torch.Generator().manual_seed(settings.seed)
    latents = torch.randn(settings.images, m.in_channels, m.input_size, m.input_size, generator=generator)
    labels_B = torch.randint(m.num_classes, (settings.images,), generator=generator)
    x_BSD = _moe_input(model, latents, labels_B)

    moe.to(settings.device, settings.dtype)
    x_BSD = x_BSD.to(settings.device, settings.dtype)
    if routing != "real":
        x_conditional = x_BSD[: settings.num_conditional]
        pattern = settings.pattern(routing)
        expert_T = planned_experts(pattern, len(x_conditional) * m.tokens, m.num_experts, settings.seed)
        expert_T, prototype_ED = expert_T.to(settings.device), prototypes_of(moe).detach()
        x_conditional.copy_(
            bias_tokens_towards(x_conditional.flatten(0, 1), expert_T, prototype_ED).view_as(x_conditional)
        )
    return moe, x_BSD.requires_grad_()


def _moe_input(model: DiT, latents: Tensor, labels_B: Tensor) -> Tensor:
    """The input (B, S, D) of the MoE layer in the second block of a model."""
    first, second = cast(tuple[Block, Block], tuple(model.blocks))
    with torch.no_grad():
        embedded = model.embed(latents, torch.full((len(latents),), 1000.0), labels_B)
        condition, *_ = model.conditions(embedded.c_BD, embedded.modulation)
        x_BSD, h_BSD, gate_BD, *_ = first.attention_half(embedded.x_BSD, condition, embedded.context)
        x_BSD = x_BSD + gate_BD.unsqueeze(1) * first.mlp(h_BSD)
        return second.attention_half(x_BSD, condition, embedded.context)[1].clone()


def check_load(moe: MoE, x_BSD: Tensor, pattern: str, num_conditional: int) -> list[int]:
    """Tokens of each expert. Raises BenchmarkError if they are not those of the pattern."""
    with torch.no_grad():
        load_E = [int(rows) for rows in moe.route(x_BSD, num_conditional)[1].load_E]
    if pattern != "real" and load_E != (planned := planned_counts(pattern, sum(load_E), len(load_E))):
        raise BenchmarkError(f"{pattern} routing: experts got {load_E} tokens, planned were {planned}")
    return load_E


def layer_flops(model: ModelConfig, dense: bool) -> int:
    """FLOPs of one layer's forward pass for one image, from the cost table, router included; a product has 2·m·n·k."""
    parts = ("MLP",) if dense else ("router", "routed experts", "shared expert")
    model = replace(dense_model(model), depth=1) if dense else replace(model, depth=1, moe_every=1)
    return sum(layer.flops for layer in cost.layers(model) if layer.part in parts)


def dense_model(model: ModelConfig) -> ModelConfig:
    """The dense DiT whose MLPs have as many FLOPs per token as our experts."""
    width = model.top_k * model.moe_width + model.shared_experts * model.shared_width
    return replace(model, router="dense", mlp_ratio=ratio_of(width, model.hidden_size))


def necessary_bytes(model: ModelConfig, settings: Settings, width: int, dense: bool) -> int:
    """The memory that a layer needs besides its input and parameters, if backward recomputes nothing; in bytes.

    Kept for backward, per token: the output D, and 2·F for each dense expert or MLP, its hidden values before and after
    the activation (3·F for a SwiGLU). Per routed row: the sorted row D, its output D (for the gradient of its routing
    weight), and the same. In backward F more for each routed row, or for each token of the dense contender: the
    gradient of the hidden values is made before any of the above is freed. With `capacity_factor` there are as many
    rows as slots.

    Args:
        width: bytes of an element.
        dense: for the dense contender.
    """
    D, F, S = model.hidden_size, model.moe_width, model.tokens
    hidden = model.hidden_projections + 1
    T, R = settings.images * S, settings.num_conditional * S * model.top_k
    if dense:
        F = dense_model(model).mlp_width
        return width * (T * D + (hidden + 1) * T * F)
    null = T - settings.num_conditional * S
    if model.capacity_factor:
        R = model.num_experts * math.ceil(model.capacity_factor * T * model.top_k / model.num_experts)
    dense_hidden = T * model.shared_experts * model.shared_width + null * model.unconditional_experts * F
    return width * (T * D + hidden * dense_hidden + R * (2 * D + (hidden + 1) * F))


def _parts(moe: MoE, x_BSD: Tensor, grad_BSD: Tensor, num_conditional: int) -> dict[str, Work]:
    """The parts of our layer, each timed separately: router, routed experts on sorted rows, dense experts."""
    calls: list[tuple[Tensor, ExpertOffsets]] = []
    handle = moe.experts.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    try:
        with torch.no_grad():
            inputs, _ = moe.route(x_BSD, num_conditional)
            moe.run_experts(*inputs)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise BenchmarkError(f"the routed experts were called {len(calls)} times, not once: parts cannot be timed")
    rows_RD, offsets = calls[0]
    rows_RD = rows_RD.detach().clone().requires_grad_()
    shared, unconditional = dense_experts(moe)
    grad_RD, grad_R = torch.ones_like(rows_RD), torch.ones_like(inputs.assignment.weight_R)
    outputs: list[Tensor] = []

    def prepare() -> None:
        moe.zero_grad(set_to_none=True)
        x_BSD.grad = rows_RD.grad = None
        outputs.clear()

    def route() -> None:
        _, routed = moe.route(x_BSD, num_conditional)
        losses = auxiliary_losses([auxiliary_of(routed, None)])
        outputs.extend([routed.assignment.weight_R, *losses.values()])

    def dense() -> None:
        outputs.extend([shared(x_BSD), unconditional(x_BSD[num_conditional:])])

    def work(forward: Callable[[], None], gradients: list[Tensor]) -> Work:
        return Work({"forward": forward, "backward": lambda: backward(outputs, gradients)}, prepare)

    return {
        "part router": work(route, [grad_R]),
        "part routed experts": work(lambda: outputs.append(moe.experts(rows_RD, offsets)), [grad_RD]),
        "part dense experts": work(dense, [grad_BSD, grad_BSD[num_conditional:]]),
    }


def parts_summary(samples: Samples) -> dict[str, Mapping]:
    """Seconds of the parts of our layer: part -> phase -> spread.

    "dispatch and combine" is the rest: in each round the time of the layer minus the times of its parts.
    """
    names = [name for name in samples if name.startswith("part ")]
    summaries = {}
    for name in names:
        summaries[name.removeprefix("part ")] = {phase: asdict(spread(v)) for phase, v in samples[name].items()}
    rest = {}
    for phase, values in samples["ours"].items():
        part_seconds = zip(*(samples[name][phase] for name in names), strict=True)
        rest[phase] = asdict(spread([ours - sum(parts) for ours, parts in zip(values, part_seconds, strict=True)]))
    return summaries | {"dispatch and combine": rest}
