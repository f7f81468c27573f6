"""One rank's part of the logical model: built from a configuration, or taken from a model that somebody has made.

`build` describes the model on the meta device, allocates this rank's slice of each parameter, and sets regions and
dispatchers. Initial values depend only on (seed, name, expert), so the logical model is the same at every (tp, ep).

`parallelize` divides an existing model, such as one of another project that contains our layers.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from megapromoe.config.expert_placement import Placements
from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh, make_mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.nn.block import Block
from megapromoe.nn.compile import compile_model
from megapromoe.nn.dit import DiT
from megapromoe.nn.initial_values import InitialValues
from megapromoe.nn.logical_module import LogicalModule
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import Router
from megapromoe.nn.sharding import Sharding

logger = logging.getLogger(__name__)


def layouts(model: nn.Module) -> dict[str, ParameterLayout]:
    """The layout of every parameter of a model at its logical shapes, from the types of its modules.

    Parameters of modules of other libraries are replicated.
    """
    table = {}
    for name, parameter in model.named_parameters():
        module, attribute = _owner(model, name)
        layout = ParameterLayout(name, tuple(parameter.shape))
        if isinstance(module, LogicalModule):
            layout = replace(layout, expert=module.has_experts, placed=module.placed)
            if rule := module.rules.get(attribute):
                layout = replace(layout, split=rule.split, hidden_matrices=rule.hidden_matrices)
        table[name] = layout
    return table


def build(
    config: Config,
    mesh: Mesh | None = None,
    device: torch.device | str = "cpu",
    undrawn: torch.dtype | None = None,
    placements: Placements | None = None,
) -> DiT:
    """Returns this rank's model in float32, with initial values from `train.seed` and `model.layouts` (see `layouts`).

    Without a mesh, in a process without a torch.distributed job, it is the whole model.

    Args:
        undrawn: the parameters are zeros of this type, for a caller that writes `initial_values` elsewhere.
        placements: which ranks have which experts, for some blocks or all; the other blocks have consecutive experts.

    Raises ValueError if tp does not divide a dimension that it splits.
    """
    mesh = mesh or make_mesh()
    model = _logical_model(config, placements)
    model.layouts = layouts(model)
    values = InitialValues(model, model.layouts, mesh, config.train.seed)
    buffers = {name: values.buffer(name) for name, _ in model.named_buffers()}
    for name, layout in model.layouts.items():
        module, attribute = _owner(model, name)
        local = torch.zeros(layout.local_shape(mesh), dtype=undrawn, device=device)
        if undrawn is None:
            values.write(name, local.view(-1))
        module.register_parameter(attribute, nn.Parameter(local))
    for name, value in buffers.items():
        module, attribute = _owner(model, name)
        persistent = attribute not in module._non_persistent_buffers_set
        module.register_buffer(attribute, value.to(device), persistent=persistent)
    apply_parallelism(model, mesh)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = config.parallel.recompute
    if config.model.has_custom_router:
        _compare_with_plan(model)
    if config.train.compile:
        compile_model(model)
    return model


def initial_values(config: Config, mesh: Mesh, placements: Placements | None = None) -> InitialValues:
    """The initial values that `build` gives the parameters of this rank."""
    model = _logical_model(config, placements)
    return InitialValues(model, layouts(model), mesh, config.train.seed)


def _logical_model(config: Config, placements: Placements | None) -> DiT:
    """The model at its logical shapes, without values, with the placements of its experts."""
    with torch.device("meta"):
        model = DiT(config.model)
    for number, placement in (placements or {}).items():
        moe = model.blocks[number].mlp
        assert isinstance(moe, MoE), f"block {number} has no routed experts"
        moe.place_experts(placement)
    return model


@torch.no_grad()
def parallelize(model: nn.Module, mesh: Mesh) -> Sharding:
    """Divides a model over the ranks of a mesh. Collective; the logical model is that of rank 0.

    Every rank has made the whole model, which may be of any class. Our layers in it keep this rank's part of their
    parameters, and communicate from then on; all other parameters are replicated. Parameters stay the same objects, but
    their shapes change: make the optimizer afterwards, and save the model by `Sharding.state_dict`.

    Args:
        model: at its logical shapes, on the device of this rank.
        mesh: of `make_mesh`.

    Returns:
        what a training loop needs to reduce gradients, to clip them and to save the model.

    Raises ValueError if tp does not divide a dimension that it splits.
    """
    table = layouts(model)
    shapes = {name: layout.local_shape(mesh) for name, layout in table.items()}  # raises before anything changes
    if mesh.world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            packed = tensor.data.contiguous()
            dist.broadcast(packed, mesh.world.ranks[0], group=mesh.world.process_group)
            tensor.data.copy_(packed)
    for name, parameter in model.named_parameters():
        if shapes[name] != tuple(parameter.shape):
            parameter.data = table[name].local_shard(parameter.data, mesh)
            parameter.grad = None
    apply_parallelism(model, mesh)
    if isinstance(model, DiT):
        model.layouts = table
    return Sharding(model, mesh, table)


def apply_parallelism(model: nn.Module, mesh: Mesh) -> None:
    """Sets on the modules what depends on the mesh: regions, dispatchers, statistics groups."""
    for module in model.modules():
        if isinstance(module, LogicalModule):
            module.set_mesh(mesh)


def _compare_with_plan(model: DiT) -> None:
    """Logs a warning if a user's router has more or fewer parameters than its class states for plans."""
    router = next((module for module in model.modules() if isinstance(module, Router)), None)
    if router is None:
        return
    planned = sum(layer.parameters for layer in router.planned_layers(model.config))
    built = sum(p.numel() for p in router.parameters())
    if planned != built:
        logger.warning(
            "model.router = %r: has %d parameters in a layer, but planned_layers() of the class counts %d; parameters,"
            " FLOPs and utilisation that are shown are wrong by that",
            *(model.config.router, built, planned),
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter or buffer `name`, and its attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
