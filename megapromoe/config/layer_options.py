"""The options of one MoE layer that is used outside of our models: those fields of `ModelConfig` that concern it."""

from dataclasses import fields
from typing import Any, TypedDict

from megapromoe.config import extensions
from megapromoe.config.model_options import ROUTERS, UNROUTED, ModelConfig
from megapromoe.config.reader import read_values, suggest
from megapromoe.config.rules import layer_rules
from megapromoe.errors import ExitCode, Violations


class LayerOptions(TypedDict, total=False):
    """Options of an MoE layer besides its sizes and its router; `ModelConfig` has their meanings and defaults."""

    top_k: int
    expert_width: int
    expert_ratio: float
    activation: str
    shared_expert: bool
    num_shared_experts: int
    shared_expert_width: int
    unconditional_expert: bool
    num_unconditional_experts: int
    score_function: str
    rcl_weight: float
    rcl_temperature: float
    rcl_tokens: str
    balance_weight: float
    balance_form: str
    balance_bias: float
    batch_scope: str
    capacity_factor: float
    num_classes: int
    superclasses: str
    classification_weight: float
    kmeans_decay: float
    mixture_variance: str
    mixture_weight: float
    capacity_predictor_weight: float
    router_similarity_weight: float
    threshold_decay: float


LAYER_FIELDS = ("hidden_size", "num_experts", *LayerOptions.__annotations__)


class LayerError(Violations):
    """Options with which an MoE layer cannot be made."""

    subject = "the options of MoE"
    exit_code = ExitCode.MISCONFIGURED


def layer_config(router: str, options: dict[str, Any], is_class: bool = False) -> ModelConfig:
    """The configuration of a layer, whose other fields have their defaults.

    Args:
        router: a value of `model.router`, or the name of a class.
        options: values of `LAYER_FIELDS`.
        is_class: `router` is the name of a class.

    Raises LayerError, listing everything that is wrong.
    """
    known = {f.name: f for f in fields(ModelConfig) if f.name in LAYER_FIELDS}
    values, problems = read_values(known, options, "MoE")
    if router not in ROUTERS and not is_class and not extensions.ROUTER.accepts(router):
        routed = [name for name in ROUTERS if name not in UNROUTED]
        problems.append(f"router = {router!r}: must be one of {', '.join(routed)}; {suggest(router, routed)}")
    if router == "dense":
        problems.append("router = 'dense': has no experts; choose another, or use megapromoe.nn.Mlp")
    if router == "conditional":
        problems.append("router = 'conditional': has no routed experts; choose another, or use megapromoe.nn.DiT")
    if not problems:
        config = ModelConfig(router=router, **values)
        broken = [(keys[0].removeprefix("model."), rule) for keys, rule in layer_rules(config)]
        if config.moe_width < 1:
            broken.append(("expert_ratio", f"times hidden_size = {config.hidden_size} must be at least 1"))
        problems = [f"{name} = {getattr(config, name)!r}: {rule}".replace("model.", "") for name, rule in broken]
    if problems:
        raise LayerError(problems)
    return config
