"""How far ours is from published implementations, tensor by tensor, and the page that says so: docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.golden_cases import config_of, null_last, parameters_of, tensors_of
from torch import Tensor

from megapromoe.config.model_options import ModelConfig
from megapromoe.conversion.published_names import from_published
from megapromoe.nn.parallelize import build

LIMIT = 1e-5  # of every tensor, relative
ZERO_LIMIT = 1e-8  # of a gradient that is zero by mathematics, over the norm of the whole gradient


@dataclass
class Comparison:
    """Of one golden case: ‖ours - published‖ / ‖published‖ by name, 0 where both are zero.

    `outputs`: positions, and predictions in both modes. `losses`: the mean squared error, and the auxiliary loss of
    each layer. `gradients`: of each expert and each of queries, keys and values apart. `zeros`: of gradients that are
    zero by mathematics, the larger norm of the two, over that of the whole. `unexpected`: what ours alone has.
    """

    outputs: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def relative(ours: Tensor, published: Tensor) -> float:
    """‖a - b‖ / ‖b‖ in float64; 0 where both are zero, infinite where b alone is."""
    ours, published = ours.detach().double(), published.double()
    off, size = (ours - published).norm(), published.norm()
    return float(off / size) if size > 0 else 0.0 if off == 0 else float("inf")


def parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What of a logical tensor is compared by itself: each expert, and queries, keys and values."""
    if ".mlp.experts." in name or name.endswith((".router.prototypes", ".router.gate")):
        yield from ((f"{name}[{expert}]", part) for expert, part in enumerate(tensor))
    elif ".attn.qkv." in name:
        yield from ((f"{name}[{which}]", part) for which, part in zip("qkv", tensor.chunk(3), strict=True))
    else:
        yield name, tensor


def is_zero(name: str, config: ModelConfig) -> bool:
    """Is this gradient zero by mathematics? A key's bias adds the same to all of a query's scores."""
    return name.endswith("attn.qkv.bias[k]") and config.qk_norm != "layer"


def compare(case: str) -> Comparison:
    """Runs a golden case by our model, in evaluation and in training mode."""
    config, comparison = config_of(case), Comparison()
    model = build(config)
    missing, unexpected = model.load_state_dict(parameters_of(case), strict=False)
    comparison.unexpected += sorted(set(missing) - {n for n, _ in model.named_buffers()}) + unexpected
    if "pos_embed" in (published := tensors_of(case, "param")):
        comparison.outputs["positions"] = relative(model.pos_embed, published["pos_embed"])
    given, out, loss = (tensors_of(case, kind) for kind in ("in", "out", "loss"))
    order, conditional = null_last(given["y"], config.model.null_class)
    x, t, y, noise = (given[name][order] for name in ("x", "t", "y", "noise"))

    model.eval()
    with torch.no_grad():
        prediction, auxiliary = model(x, t, y, conditional)
    comparison.outputs["eval"] = relative(prediction, out["eval"][order])
    comparison.unexpected += [f"loss {name} in evaluation" for name in auxiliary.losses]

    model.train()
    prediction, auxiliary = model(x, t, y, conditional)
    comparison.outputs["train"] = relative(prediction, out["train"][order])
    mse = (prediction[:, : config.model.in_channels] - (noise - x)).square().mean()
    comparison.losses["mse"] = relative(mse.detach(), loss["mse"])
    (mse + auxiliary.total()).backward()
    per_layer = {name: value.detach() for name, value in auxiliary.losses.items()}
    layers = {name: value for name, value in loss.items() if name.startswith("aux")}
    for name, value in layers.items():
        comparison.losses[name] = relative(sum(per_layer.values())[int(name.split(".")[1])], value)
    if "capacity_pred" in loss:
        unweighted = per_layer["capacity"].sum() / config.model.capacity_predictor_weight
        comparison.losses["capacity_pred"] = relative(unweighted, loss["capacity_pred"])
    elif not layers:
        comparison.unexpected += [f"loss {name}" for name in per_layer]

    gradients = from_published(tensors_of(case, "grad"), config.model)
    norm_of_all = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for name, published_gradient in gradients.items():
        pairs = zip(parts(name, ours.pop(name)), parts(name, published_gradient), strict=True)
        for (part, gradient), (_, other) in pairs:
            if is_zero(part, config.model):
                comparison.zeros[part] = float(max(gradient.double().norm(), other.double().norm()) / norm_of_all)
            else:
                comparison.gradients[part] = relative(gradient, other)
    comparison.unexpected += [f"gradient {name}" for name, g in ours.items() if g.abs().max() > 0]
    return comparison


def worst(deviations: dict[str, float]) -> tuple[float, str]:
    """The largest deviation, and whose it is."""
    name = max(deviations, key=lambda name: deviations[name])
    return deviations[name], name


# ---- docs/fidelity.md

MODELS = {
    "promoe_tc": "ProMoE, token choice",
    "promoe_ec": "ProMoE, expert choice",
    "promoe_ec_softmax": "the same, softmax gate over an image's tokens",
    "dense": "DiT",
    "tc": "TC-DiT",
    "ec": "EC-DiT",
    "diffmoe": "DiffMoE",
}
HEAD = """\
# Fidelity to the published models

Our models compared with published implementations, whose inputs and results are in `tests/golden/`. All numbers are
relative deviations ‖ours − published‖ / ‖published‖ in float32. The limit of each is 1e-5. Written by `make fidelity`.

## Outputs, losses, gradients

The table shows the largest deviation of the outputs (in evaluation and in training), of the losses (denoising, and the
auxiliary loss of each MoE layer), and of the gradients. Gradients are compared for each tensor separately, for each
expert and prototype separately, and separately for queries, keys and values. The gradient of a key's bias is
mathematically zero. The last column is its norm divided by that of the whole gradient, with a limit of 1e-8.

| model | case | outputs | losses | gradients | of which tensor | gradients compared | zero gradients |
|---|---|---|---|---|---|---|---|
"""
LONG = """
## A long run on real digits

The published ProMoE classes and ours train from the same weights on the same batches: {steps:,} AdamW steps of 64
images of scikit-learn's digits (D 64, 4 blocks, 4 experts). The table shows the largest and the mean deviation of the
denoising loss (MSE) of a step, the largest deviation of the contrastive loss (RCL), and the mean MSE. The RCL is near
1e-3 after some steps, and the published code computes it in float32 from logits near 1/0.07. So its deviation is
relative to the whole loss of the step. For the first 100 steps the limit is 1e-5. Later, rounding differences grow, as
in any training.

| steps | MSE: largest | mean | RCL over the whole loss: largest | mean MSE, published | ours | deviation |
|---|---|---|---|---|---|---|
"""
RANGES = ((1, 10), (11, 100), (101, 200), (201, 400), (401, 700), (701, 1000))
TAIL = """
## What can be configured, and what cannot

* **Several shared and unconditional experts** (the paper's N_s and N_u): `model.num_shared_experts`,
  `model.num_unconditional_experts`. The published code builds one of each. The outputs of several are summed with
  weight 1, as in DeepSeekMoE. N_s experts of width F compute the same as one of width N_s·F. In files of the published
  format they are `shared_experts.0`, ..., and the last of `experts`. These names are ours; the published classes do not
  load them.
* **Widths**: `model.expert_width` (`moe_intermediate_size`) and `model.shared_expert_width`
  (`shared_expert_intermediate_size`). `model.expert_ratio` is rounded down to a width.
* **Fewer tokens than experts**: with expert choice, each expert of ProMoE takes at least one token, as published. In
  the published EC-DiT experts take none, so that its MoE layers do nothing; this is refused. DiffMoE chooses over the
  batch.
* **Not built**: shared experts of the baselines (`n_shared_experts`; SwiGLU without biases in TC-DiT and EC-DiT),
  `use_swiglu`, `use_diff_expert`, `head_dim`, `init_MoeMLP`, `capacity_schedule`.
* `norm_topk_prob` and `CapacityPred_loss_weight` are options that no published code reads: weights are never
  renormalised, and the weight of the predictor's loss is 0.01.
"""


def write_page(file: Path, cases: dict[str, Comparison], long_run: tuple[dict, dict] | None) -> None:
    """Writes docs/fidelity.md."""
    text = HEAD
    for case, comparison in cases.items():
        gradient, name = worst(comparison.gradients)
        cells = [MODELS[case], f"`{case}`"]
        cells += [f"{worst(kind)[0]:.1e}" for kind in (comparison.outputs, comparison.losses)]
        cells += [
            f"{gradient:.1e}",
            f"`{name}`",
            str(len(comparison.gradients)),
            f"{max(comparison.zeros.values()):.0e}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    if long_run:
        text += _long_table(*long_run)
    file.write_text(text + TAIL)


def long_run_deviations(ours: dict, published: dict) -> tuple[list[float], list[float]]:
    """Of each step that ours has: |ours - published| of the MSE over it, and of the RCL over the sum of both losses."""
    steps = list(zip(ours["loss"], published["loss"], ours["rcl"], published["rcl"], strict=False))
    mse = [abs(a - b) / b for a, b, _, _ in steps]
    return mse, [abs(c - d) / (b + d) for _, b, c, d in steps]


def _long_table(ours: dict, published: dict) -> str:
    text = LONG.format(steps=len(ours["loss"]))
    for first, last in RANGES:
        steps = slice(first - 1, last)
        mse, rcl = (off[steps] for off in long_run_deviations(ours, published))
        cells = [f"{max(mse):.1e}", f"{sum(mse) / len(mse):.1e}", f"{max(rcl):.1e}"]
        theirs, mean = (sum(run["loss"][steps]) / (last - first + 1) for run in (published, ours))
        cells += [f"{theirs:.6f}", f"{mean:.6f}", f"{abs(mean - theirs) / theirs:.1e}"]
        text += f"| {first}–{last} | {' | '.join(cells)} |\n"
    off = abs(ours["fixed"] - published["fixed"]) / published["fixed"]
    return text + (
        f"\nAfter the last step the loss on 5,120 fixed draws is {published['fixed']:.5f} published and"
        f" {ours['fixed']:.5f} ours ({off:.1e}).\n"
    )
