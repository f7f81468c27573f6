"""The network as a library: the MoE layer and its routers, DiT, and how a model is divided over ranks.

docs/library.md describes the public names.
"""

from megapromoe.config.layer_options import LayerError
from megapromoe.distributed.mesh import Mesh, make_mesh
from megapromoe.distributed.parameter_layout import Split
from megapromoe.nn.dit import AuxiliaryOutput, DiT
from megapromoe.nn.layers import Attention, Mlp, modulate
from megapromoe.nn.logical_module import LogicalModule, Normal, ParameterRule, xavier_uniform, zeros
from megapromoe.nn.moe.assignment import TokenAssignment, expert_choice, mask_choice, token_choice, top_k
from megapromoe.nn.moe.auxiliary import MoEAuxiliary, auxiliary_loss, auxiliary_losses
from megapromoe.nn.moe.balance_bias import BalanceBiases
from megapromoe.nn.moe.layer import ROUTERS, MoE
from megapromoe.nn.moe.routers import Router, RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.parallelize import build, parallelize
from megapromoe.nn.sharding import Sharding
from megapromoe.nn.text_condition import TextCondition

__all__ = [
    "ROUTERS",
    "Attention",
    "AuxiliaryOutput",
    "BalanceBiases",
    "DiT",
    "LayerError",
    "LogicalModule",
    "Mesh",
    "Mlp",
    "MoE",
    "MoEAuxiliary",
    "Normal",
    "ParameterRule",
    "Router",
    "RouterOutput",
    "RoutingCache",
    "Sharding",
    "Split",
    "TextCondition",
    "TokenAssignment",
    "auxiliary_loss",
    "auxiliary_losses",
    "build",
    "expert_choice",
    "make_mesh",
    "mask_choice",
    "modulate",
    "parallelize",
    "token_choice",
    "top_k",
    "xavier_uniform",
    "zeros",
]
