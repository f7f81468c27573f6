"""Names of the published checkpoints (ProMoE, TC-DiT, EC-DiT, DiffMoE, DiT) and ours.

Ours differ only inside an MoE layer: routed experts are stacked, and the unconditional expert, published as the last of
`experts`, stands alone.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megapromoe.config import ModelConfig

_LAYER = re.compile(r"(blocks\.\d+\.mlp)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(fc1|fc2|up_proj|down_proj)\.(weight|bias)")
_PLAIN = {
    "cluster_centers": "router.prototypes",
    "gate.weight": "router.gate",
    "gate_weight": "router.gate",
    "expert_threshold": "router.threshold",
}
_PROJECTION = {"up_proj": "fc1", "down_proj": "fc2", "fc1": "fc1", "fc2": "fc2"}


def locate(name: str, config: ModelConfig) -> tuple[str, int | None]:
    """Where a published tensor belongs: our logical name, and the expert's row in it (None: the whole tensor)."""
    layer = _LAYER.fullmatch(name)
    if not layer:
        return name, None
    prefix, rest = layer.groups()
    if rest in _PLAIN:
        return f"{prefix}.{_PLAIN[rest]}", None
    if expert := _EXPERT.fullmatch(rest):
        number, projection, kind = int(expert[1]), _PROJECTION[expert[2]], expert[3]
        if number == config.num_experts and config.unconditional_expert:
            return f"{prefix}.unconditional.{projection}.{kind}", None
        return f"{prefix}.experts.{projection}.{kind}", number
    if rest.startswith("shared_expert."):
        _, projection, kind = rest.split(".")
        return f"{prefix}.shared.{_PROJECTION[projection]}.{kind}", None
    if rest.startswith("capacity_predictor."):
        return f"{prefix}.router.{rest.replace('capacity_predictor', 'predictor')}", None
    return name, None


def from_published(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Published tensors by published name -> logical tensors by our names; experts are stacked.

    `pos_embed`, which is computed, is left out. Raises ValueError if the experts of a layer are not 0..E-1.
    """
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
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
