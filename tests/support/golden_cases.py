"""Reads the golden cases: configurations, inputs and results of published implementations (golden/README.md)."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import Config
from megapromoe.conversion.published_names import from_published

FOLDER = Path(__file__).parents[1] / "golden"
CASES = ("promoe_tc", "promoe_ec", "promoe_ec_softmax", "dense", "tc", "ec", "diffmoe")
ROUTER = {"promoe_tc": "promoe", "promoe_ec_softmax": "promoe_ec", "published_run": "promoe", "long_run": "promoe"}


def config_of(case: str) -> Config:
    """The config that describes a golden case."""
    arguments = json.loads((FOLDER / f"{case}.json").read_text())
    moe = arguments["moe"] or {}
    model = ModelConfig(
        router=ROUTER.get(case, case),
        hidden_size=arguments["hidden_size"],
        depth=arguments["depth"],
        heads=arguments["num_heads"],
        patch_size=arguments["patch_size"],
        input_size=arguments["input_size"],
        in_channels=arguments["in_channels"],
        num_classes=arguments["num_classes"],
        num_experts=moe.get("num_routed_experts", moe.get("num_experts", 1)),
        top_k=moe.get("top_k", moe.get("capacity", 1)),
        expert_width=moe.get("moe_intermediate_size", 4 * arguments["hidden_size"]),
        shared_expert_width=moe.get("shared_expert_intermediate_size", 0),
        score_function=moe.get("router_weight_mode", "identity"),
        rcl_weight=moe.get("routing_contrastive_lam", 0.0),
        rcl_temperature=moe.get("routing_contrastive_temperature", 0.07),
        balance_weight=0.01 if case == "tc" else moe.get("load_balance_loss_coef", 0.0),
    )
    return replace(Config(), model=model)


def tensors_of(case: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a case whose names start with "prefix.", without it."""
    cut = len(prefix) + 1
    every = load_file(FOLDER / f"{case}.safetensors")
    return {name[cut:]: tensor for name, tensor in every.items() if name.startswith(prefix + ".")}


def parameters_of(case: str, prefix: str = "param") -> dict[str, torch.Tensor]:
    """The case's tensors of `prefix` under our logical names."""
    return from_published(tensors_of(case, prefix), config_of(case).model)


def null_last(y_B: torch.Tensor, null_class: int) -> tuple[torch.Tensor, int]:
    """The stable order [conditional | null] of a batch, and how many are conditional."""
    order_B = torch.argsort((y_B == null_class).int(), stable=True)
    return order_B, int((y_B != null_class).sum())
