"""The parameter names of the published checkpoints (ProMoE, TC-DiT, EC-DiT, DiffMoE, DiT), and ours.

They differ only inside an MoE layer: we stack the routed experts, and the unconditional expert, which is the last of
`experts` in published files, has its own name. The release has one shared expert, `shared_expert`, and one
unconditional one. For several we continue its scheme: `shared_experts.0`, `shared_experts.1`, ..., and the last ones of
`experts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megapromoe.config.model_options import PROMOE_ROUTERS, ModelConfig
from megapromoe.nn.layers import position_table

_LAYER = re.compile(r"(blocks\.\d+\.mlp)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(fc1|fc2|up_proj|down_proj)\.(weight|bias)")
_SHARED = re.compile(r"(?:shared_expert|shared_experts(\.\d+))\.(up_proj|down_proj)\.(weight|bias)")
_PLAIN = {
    "cluster_centers": "router.prototypes",
    "gate.weight": "router.gate",
    "gate_weight": "router.gate",
    "expert_threshold": "router.threshold",
}
_PROJECTION = {"up_proj": "fc1", "down_proj": "fc2", "fc1": "fc1", "fc2": "fc2"}


def locate(name: str, config: ModelConfig) -> tuple[str, int | None]:
    """Our logical name of a published tensor, and the expert's row in it (None: the whole tensor)."""
    layer = _LAYER.fullmatch(name)
    if not layer:
        return name, None
    prefix, rest = layer.groups()
    if rest in _PLAIN:
        return f"{prefix}.{_PLAIN[rest]}", None
    if expert := _EXPERT.fullmatch(rest):
        number, projection, kind = int(expert[1]), _PROJECTION[expert[2]], expert[3]
        unconditional = number - config.num_experts
        if 0 <= unconditional < config.unconditional_experts:
            index = f".{unconditional}" if config.unconditional_experts > 1 else ""
            return f"{prefix}.unconditional{index}.{projection}.{kind}", None
        return f"{prefix}.experts.{projection}.{kind}", number
    if shared := _SHARED.fullmatch(rest):
        return f"{prefix}.shared{shared[1] or ''}.{_PROJECTION[shared[2]]}.{shared[3]}", None
    if rest.startswith("capacity_predictor."):
        return f"{prefix}.router.{rest.replace('capacity_predictor', 'predictor')}", None
    return name, None


def published_names(names: Iterable[str], config: ModelConfig) -> list[tuple[str, str | None, int | None]]:
    """(published name, our name, expert's row) of each tensor of a model, in the order of the published model.

    The state of AdamW is in this order. Our name is None for constants that we compute: see `constants`.

    Args:
        names: our parameters and persistent buffers, in the order of our model.

    Source: the modules of the ProMoE release, in the order of their registration.
    """
    order: list[tuple[str, str | None, int | None]] = [("pos_embed", None, None)]
    layers: dict[str, set[str]] = {}
    rest = []
    for name in names:
        layer = _LAYER.fullmatch(name)
        if layer and layer[2].split(".")[0] in ("router", "experts", "shared", "unconditional"):
            if layer[1] not in layers:
                rest.append(layer[1])
            layers.setdefault(layer[1], set()).add(layer[2])
        else:
            rest.append(name)
    for name in rest:
        order += _layer_names(name, layers[name], config) if name in layers else [(name, name, None)]
    return order


def _layer_names(prefix: str, has: set[str], config: ModelConfig) -> Iterator[tuple[str, str | None, int | None]]:
    """`published_names` of one MoE layer."""
    first, second = ("up_proj", "down_proj") if config.router in PROMOE_ROUTERS else ("fc1", "fc2")
    parts = [(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in (("fc1", first), ("fc2", second))
             for kind in ("weight", "bias")]  # fmt: skip

    def named(theirs: str, ours: str | None, row: int | None = None) -> tuple[str, str | None, int | None]:
        return f"{prefix}.{theirs}", ours and f"{prefix}.{ours}", row

    if config.router in PROMOE_ROUTERS:
        yield named("cluster_centers", "router.prototypes")
    elif config.router != "tc":
        yield named("gate_weight", "router.gate")
    if config.router == "diffmoe":
        yield named("expert_threshold", "router.threshold")
        yield named("ema_decay", None)
    for expert in range(config.num_experts):
        yield from (named(f"experts.{expert}.{theirs}", f"experts.{ours}", expert) for ours, theirs in parts)
    for number in range(config.unconditional_experts):
        last, index = config.num_experts + number, f".{number}" if config.unconditional_experts > 1 else ""
        yield from (named(f"experts.{last}.{theirs}", f"unconditional{index}.{ours}") for ours, theirs in parts)
    if config.router == "tc":
        yield named("gate.weight", "router.gate")
    for number in range(config.shared_experts):
        published, index = ("shared_expert", "") if config.shared_experts == 1 else ("shared_experts", f".{number}")
        yield from (named(f"{published}{index}.{theirs}", f"shared{index}.{ours}") for ours, theirs in parts)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        if f"router.predictor.{name}" in has:
            yield named(f"capacity_predictor.{name}", f"router.predictor.{name}")


def constants(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a published checkpoint that the config determines: positions, and DiffMoE's threshold decay."""
    side = config.input_size // config.patch_size
    out = {"pos_embed": position_table(side, config.hidden_size, config.position_scale)[None]}
    if config.router == "diffmoe":
        decay = torch.tensor([config.threshold_decay])
        out |= {f"blocks.{block}.mlp.ema_decay": decay for block in config.moe_blocks}
    return out


def is_buffer(published: str) -> bool:
    """Whether a published tensor is a buffer, which AdamW has no state of."""
    return published.endswith((".expert_threshold", ".ema_decay"))


def from_published(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Converts tensors by published name to logical tensors by our names; experts are stacked.

    Constants (see `constants`) are omitted. Raises ValueError if the experts of a layer are not 0..E-1.
    """
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name == "pos_embed" or name.endswith(".ema_decay"):
            continue
        ours, expert = locate(name, config)
        if expert is None:
            out[ours] = tensor
        else:
            stacks.setdefault(ours, {})[expert] = tensor
    for name, rows in stacks.items():
        if sorted(rows) != list(range(config.num_experts)):
            raise ValueError(
                f"{name}: found experts {sorted(rows)}, model.num_experts is {config.num_experts}; "
                "this checkpoint is of a model with another number of experts"
            )
        out[name] = torch.stack([rows[e] for e in range(config.num_experts)])
    return out
