"""The MoE layer alone, forward and backward, in training mode: time, products, memory, and what its parts cost."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from megapromoe.benchmark.baseline_wrapper import BaselineWrapper, CannotRun, Layer, dense_experts, prototypes_of
from megapromoe.benchmark.baselines import contender
from megapromoe.benchmark.counters import Counter
from megapromoe.benchmark.measure import Samples, Work, interleave, make_clock, spread, summary
from megapromoe.benchmark.routing_patterns import counts, lean, plan
from megapromoe.config.options import Config, ModelConfig, ratio_of
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.errors import UserError
from megapromoe.nn.dit import Block, DiT
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.layer import MoE, fan_out
from megapromoe.nn.parallelize import build
from megapromoe.planning import cost


class BenchmarkError(UserError):
    """A measurement that would not be of what it says."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    `images` a micro-batch, of which the share `null` has no class (rounded); `contenders` names of
    `baselines.CONTENDERS`; `sample_steps` and `guidance` are the sampler's; `compile`: torch.compile of the dense
    stretches of all models in training; what is counted is counted without.
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

    @property
    def conditional(self) -> int:
        return self.images - round(self.images * self.null)


def measure_layer(config: Config, routing: str, settings: Settings) -> dict:
    """One scene: every contender on the same tokens under one routing, and the parts of ours.

    Args:
        config: of a ProMoE by token choice; its size and number of experts are taken.

    Returns JSON: "contenders" name -> figures, or {"cannot": reason}; "parts" of ours, see `parts`; "load".
    Raises BenchmarkError if the tokens do not go where the routing says.
    """
    torch.manual_seed(settings.seed)
    moe, x_BSD = first_layer(config, routing, settings)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    grad_BSD = torch.randn(x_BSD.shape, generator=generator).to(x_BSD)
    turns, cannot = {}, {}
    for name in settings.contenders:
        try:
            turns[name] = Turn(contender(name, moe).train(), x_BSD, grad_BSD, settings.conditional)
            turns[name].once()
        except (CannotRun, torch.OutOfMemoryError) as error:
            cannot[name] = {"cannot": str(error).splitlines()[0]}
            turns.pop(name, None)
    load = check_load(moe, x_BSD, routing, settings.conditional)
    works = {name: turn.work for name, turn in turns.items()}
    if "ours" in turns:
        works |= _parts(moe, x_BSD, grad_BSD, settings.conditional)
    samples = interleave(works, settings.rounds, make_clock(settings.device, settings.threads))

    figures = summary({name: samples[name] for name in turns}, reference="dense")
    for name, turn in turns.items():
        useful = layer_flops(config.model, dense=name == "dense") * settings.images
        figures[name] |= {"flops": {"useful": 3 * useful}, "dropped": turn.dropped}
        figures[name] |= turn.counted(necessary(config.model, settings, x_BSD.element_size(), dense=name == "dense"))
    found: dict[str, Any] = {"contenders": figures | cannot, "load": load, "tokens": x_BSD[..., 0].numel()}
    if "ours" in turns:
        found["parts"] = parts(samples)
    return found


def first_layer(config: Config, routing: str, settings: Settings, mesh: Mesh = UNSHARDED) -> tuple[MoE, Tensor]:
    """The first MoE of the model as initialised, and tokens (B, S, D) to run it on, those of null images last."""
    m = config.model
    config = replace(config, model=replace(m, depth=2, moe_every=2))
    model = build(config, mesh)
    moe = model.get_submodule("blocks.1.mlp")
    if not isinstance(moe, MoE):
        raise BenchmarkError(f"model.router = {m.router!r}: has no experts to measure; use promoe_tc")
    generator = torch.Generator().manual_seed(settings.seed)
    latents = torch.randn(settings.images, m.in_channels, m.input_size, m.input_size, generator=generator)
    labels_B = torch.randint(m.num_classes, (settings.images,), generator=generator)
    x_BSD = _entering(model, latents, labels_B)

    moe.to(settings.device, settings.dtype)
    x_BSD = x_BSD.to(settings.device, settings.dtype)
    if routing != "real":
        cut = settings.conditional
        expert_T = plan(routing, cut * m.tokens, m.num_experts, settings.seed).to(settings.device)
        x_BSD[:cut] = lean(x_BSD[:cut].flatten(0, 1), expert_T, prototypes_of(moe).detach()).view_as(x_BSD[:cut])
    return moe, x_BSD.requires_grad_()


def _entering(model: DiT, latents: Tensor, labels_B: Tensor) -> Tensor:
    """What enters the MoE of a model's second block."""
    first, second = cast(tuple[Block, Block], tuple(model.blocks))
    with torch.no_grad():
        condition = model.t_embedder(torch.full((len(latents),), 1000.0)) + model.y_embedder(labels_B)
        x_BSD, h_BSD, gate_BD = first.attend(model.x_embedder(latents) + model.pos_embed, condition)
        x_BSD = x_BSD + gate_BD.unsqueeze(1) * first.mlp(h_BSD)
        return second.attend(x_BSD, condition)[1].clone()


def check_load(moe: MoE, x_BSD: Tensor, routing: str, conditional: int) -> list[int]:
    """Tokens of each expert. Raises BenchmarkError if they are not the planned ones."""
    with torch.no_grad():
        load_E = [int(rows) for rows in moe.route(x_BSD, conditional).load_E]
    if routing != "real" and load_E != (planned := counts(routing, sum(load_E), len(load_E))):
        raise BenchmarkError(f"{routing} routing: experts got {load_E} tokens, planned were {planned}")
    return load_E


class Turn:
    """Forward and backward of a layer, on the same tokens and output gradient each time."""

    def __init__(self, layer: Layer, x_BSD: Tensor, grad_BSD: Tensor, conditional: int):
        self.layer, self.x_BSD, self.grad_BSD, self.conditional = layer, x_BSD, grad_BSD, conditional
        self.work = Work({"forward": self.forward, "backward": self.backward}, self.prepare)
        self.outputs: list[Tensor] = []

    @property
    def dropped(self) -> float:
        """Share of the last turn's rows that no expert computed."""
        return self.layer.dropped if isinstance(self.layer, BaselineWrapper) else 0.0

    def prepare(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x_BSD.grad = None
        self.outputs = []

    def forward(self) -> None:
        if isinstance(self.layer, Mlp):
            self.outputs = [self.layer(self.x_BSD)]
            return
        # As a block does it; contenders route all but the null images.
        x_BSD, routable_BSD, _ = fan_out(self.x_BSD, self.conditional)
        routed = self.layer.route(routable_BSD, self.conditional)
        y_BSD = self.layer(x_BSD, routed, self.conditional)
        self.outputs = [y_BSD, *self.layer.losses_of([routed]).values()]

    def backward(self) -> None:
        backward(self.outputs, [self.grad_BSD])

    def once(self) -> None:
        """A turn that is not timed."""
        self.prepare()
        self.forward()
        self.backward()
        self.prepare()

    def counted(self, necessary_bytes: int) -> dict[str, Any]:
        """A turn that is counted: see `counters`; memory in bytes, without the gradients of parameters."""
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
            of_gradients = sum(g.numel() * g.element_size() for g in gradients)
            memory["allocator_peak"] = torch.cuda.max_memory_allocated() - before - of_gradients
        memory["necessary"] = necessary_bytes
        self.prepare()
        return {"counts": said(counter), "memory": memory}


def backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Backward of outputs, the first with the given gradients, the others (losses) with 1."""
    gradients = gradients + [torch.ones_like(loss) for loss in outputs[len(gradients) :]]
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])


def said(counter: Counter) -> dict[str, Any]:
    """All counts of a counter as JSON: phase -> name -> number."""
    phases = counter.phases | {"total": counter.total}
    return {
        phase: {name: dict(value) if isinstance(value, Tally) else value for name, value in vars(one).items()}
        for phase, one in phases.items()
    }


def layer_flops(model: ModelConfig, dense: bool) -> int:
    """Products of one image in one layer's forward pass, 2·m·n·k each, from the cost table; the router's included."""
    parts = ("MLP",) if dense else ("router", "routed experts", "shared expert")
    model = replace(dense_model(model), depth=1) if dense else replace(model, depth=1, moe_every=1)
    return sum(layer.flops for layer in cost.layers(model) if layer.part in parts)


def dense_model(model: ModelConfig) -> ModelConfig:
    """The dense DiT whose MLPs do per token what our experts do."""
    width = model.top_k * model.moe_width + model.shared_experts * model.shared_width
    return replace(model, router="dense", mlp_ratio=ratio_of(width, model.hidden_size))


def necessary(model: ModelConfig, settings: Settings, width: int, dense: bool) -> int:
    """Bytes that a layer cannot do without, beside its input and parameters, if backward recomputes nothing.

    Kept for backward, per token: the output D; for each dense path (shared, unconditional, or the one MLP) its hidden
    values before and after the activation, 2·F; for each routed row the sorted row D, its output D (the gradient of
    its weight needs it) and 2·F. In backward, on top: the gradient of the hidden values of the first path, F for each
    of its rows, which is made before any of the above can go; counted for the routed rows. With `capacity_factor`
    there are as many rows as there is room for.
    """
    D, F, S = model.hidden_size, model.moe_width, model.tokens
    T, R = settings.images * S, settings.conditional * S * model.top_k
    if dense:
        F = dense_model(model).mlp_width
        return width * (T * D + 3 * T * F)
    null = T - settings.conditional * S
    if model.capacity_factor:
        R = model.num_experts * math.ceil(model.capacity_factor * T * model.top_k / model.num_experts)
    dense_hidden = T * model.shared_experts * model.shared_width + null * model.unconditional_experts * F
    return width * (T * D + 2 * dense_hidden + R * (2 * D + 3 * F))


def _parts(moe: MoE, x_BSD: Tensor, grad_BSD: Tensor, conditional: int) -> dict[str, Work]:
    """The parts of our layer as work of their own: router, routed experts on sorted rows, dense experts."""
    seen: list[tuple] = []
    handle = moe.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        with torch.no_grad():
            routed = moe.route(x_BSD, conditional)
            moe(x_BSD, routed, conditional)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise BenchmarkError(f"the routed experts were called {len(seen)} times, expected once: parts cannot be told")
    rows_RD, *rest = seen[0]
    rows_RD = rows_RD.detach().clone().requires_grad_()
    shared, unconditional = dense_experts(moe)
    grad_RD, grad_R = torch.ones_like(rows_RD), torch.ones_like(routed.route.weight_R)
    outputs: list[Tensor] = []

    def prepare() -> None:
        moe.zero_grad(set_to_none=True)
        x_BSD.grad = rows_RD.grad = None
        outputs.clear()

    def route() -> None:
        routed = moe.route(x_BSD, conditional)
        outputs.extend([routed.route.weight_R, *moe.losses_of([routed]).values()])

    def beside() -> None:
        outputs.extend([shared(x_BSD), unconditional(x_BSD[conditional:])])

    def work(forward: Callable[[], None], gradients: list[Tensor]) -> Work:
        return Work({"forward": forward, "backward": lambda: backward(outputs, gradients)}, prepare)

    return {
        "part router": work(route, [grad_R]),
        "part routed experts": work(lambda: outputs.append(moe.experts(rows_RD, *rest)), [grad_RD]),
        "part dense experts": work(beside, [grad_BSD, grad_BSD[conditional:]]),
    }


def parts(samples: Samples) -> dict[str, Mapping]:
    """Seconds of the parts of ours, and of the rest, which is dispatch and combine: round by round ours less its parts.

    Returns part -> phase -> spread; the rest is called "dispatch and combine".
    """
    names = [name for name in samples if name.startswith("part ")]
    told = {}
    for name in names:
        told[name.removeprefix("part ")] = {phase: asdict(spread(v)) for phase, v in samples[name].items()}
    rest = {}
    for phase, values in samples["ours"].items():
        taken = zip(*(samples[name][phase] for name in names), strict=True)
        rest[phase] = asdict(spread([ours - sum(one) for ours, one in zip(values, taken, strict=True)]))
    return told | {"dispatch and combine": rest}
