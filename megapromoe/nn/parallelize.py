"""Builds this rank's part of the logical model.

`build` describes the model on the meta device, allocates this rank's slice of each parameter, and sets regions and
dispatchers. Initial values depend only on (seed, name, expert), so the logical model is the same at every (tp, ep).
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import SINGLE_RANK, Mesh, make_mesh
from megapromoe.distributed.parameter_layout import ParameterLayout, Split
from megapromoe.nn.compile import compile_dense
from megapromoe.nn.dit import Block, DiT
from megapromoe.nn.layers import Attention, HeadNorm, Mlp
from megapromoe.nn.moe.capacity_dispatcher import CapacityDispatcher
from megapromoe.nn.moe.dispatcher import Dispatcher, ExpertParallelDispatcher
from megapromoe.nn.moe.expert_linear import ExpertLinear
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import Router
from megapromoe.nn.tensor_parallel import GatheredLinear, Region, RowLinear

# The dimension that tensor parallelism splits, by the end of the parameter's name. Parameters that are not listed are
# replicated: embeddings, the final layer, routers, and biases that are added after the sum over ranks.
SPLITS = [
    (r"\.attn\.qkv\.(weight|bias)", Split(0, blocks=3)),
    (r"\.attn\.proj\.weight", Split(1)),
    (r"\.mlp\.experts\.fc1\.(weight|bias)", Split(1)),
    (r"\.mlp\.experts\.fc2\.weight", Split(2)),
    (r"\.mlp(\.(shared|unconditional)(\.\d+)?)?\.fc1\.(weight|bias)", Split(0)),
    (r"\.mlp(\.(shared|unconditional)(\.\d+)?)?\.fc2\.weight", Split(1)),
    (r"blocks\.\d+\.adaLN_modulation\.1\.(weight|bias)", Split(0)),
]


def layouts(model: DiT) -> dict[str, ParameterLayout]:
    """The layout of every parameter of a model at its logical shapes."""
    table = {}
    for name, parameter in model.named_parameters():
        split = next((split for pattern, split in SPLITS if re.search(pattern + "$", name)), None)
        table[name] = ParameterLayout(name, tuple(parameter.shape), split, expert=".mlp.experts." in name)
    return table


def build(config: Config, mesh: Mesh | None = None, device: torch.device | str = "cpu") -> DiT:
    """Returns this rank's model in float32, with initial values from `train.seed` and `model.layouts` (see `layouts`).

    Without a mesh, in a process without a torch.distributed job, it is the whole model. Raises ValueError if tp does
    not divide a dimension that it splits.
    """
    mesh = mesh or make_mesh()
    with torch.device("meta"):
        model = DiT(config.model)
    model.layouts = layouts(model)
    for name, layout in model.layouts.items():
        owner, attribute = _owner(model, name)
        parameter = nn.Parameter(torch.empty(layout.local_shape(mesh), device=device))
        owner.register_parameter(attribute, parameter)
        with torch.no_grad():
            initialize_parameter(parameter, model, layout, mesh, config.train.seed)
    for name, buffer in list(model.named_buffers()):
        owner, attribute = _owner(model, name)
        value = model.initial_buffer(name, buffer.shape, _generator(config.train.seed, name))
        persistent = attribute not in owner._non_persistent_buffers_set
        owner.register_buffer(attribute, value.to(device), persistent=persistent)
    apply_parallelism(model, config, mesh)
    if config.train.compile:
        compile_dense(model)
    return model


def apply_parallelism(model: DiT, config: Config, mesh: Mesh) -> None:
    """Sets on the modules what depends on the mesh: regions, dispatchers, statistics groups; and recomputation."""
    region = Region(mesh.tp)
    expert_region = Region(mesh.tp) if mesh.expert_tp else Region()
    for module in model.modules():
        if isinstance(module, (Attention, HeadNorm, Mlp, RowLinear, GatheredLinear, MoE)):
            module.region = region
        elif isinstance(module, ExpertLinear):
            module.region = expert_region
        elif isinstance(module, Router):
            module.statistics_group = mesh.dp if config.model.batch_scope == "global" else SINGLE_RANK
        elif isinstance(module, Block):
            module.recompute = config.parallel.recompute
        if isinstance(module, MoE):
            num_experts, capacity_factor = config.model.num_experts, config.model.capacity_factor
            if capacity_factor:
                module.dispatcher = CapacityDispatcher(num_experts, mesh.ep, capacity_factor, region, mesh.expert_tp)
            elif mesh.ep.size > 1:
                module.dispatcher = ExpertParallelDispatcher(num_experts, mesh.ep, region, mesh.expert_tp)
            else:
                module.dispatcher = Dispatcher(num_experts, region, mesh.expert_tp)


def initialize_parameter(parameter: Tensor, model: DiT, layout: ParameterLayout, mesh: Mesh, seed: int) -> None:
    """Writes this rank's slice of the logical initial value into the parameter; spare expert slots get zeros."""
    if not layout.expert:
        generator = _generator(seed, layout.name)
        value = model.initial_value(layout.name, torch.Size(layout.shape), generator)
        parameter.copy_(layout.local_shard(value, mesh))
        return
    parameter.zero_()
    expert_layout = ParameterLayout(layout.name, (1, *layout.shape[1:]), layout.split, expert=False)
    for slot, expert in enumerate(layout.placement(mesh).owned(mesh.ep.rank)):
        generator = _generator(seed, layout.name, expert)
        value = model.initial_value(layout.name, torch.Size(layout.shape[1:]), generator)[None]
        parameter[slot] = (expert_layout.local_shard(value, mesh) if mesh.expert_tp else value)[0]


def _generator(seed: int, *key: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter or buffer `name`, and its attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
