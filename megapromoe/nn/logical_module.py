"""Modules that know, for each of their parameters, how it starts and which dimension tensor parallelism splits.

Both are facts of the type of a module, not of its name in a model. So a model of any kind that contains such modules
can be initialised, and divided over ranks (`parallelize.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import Split
from megapromoe.errors import UserError

Initializer = Callable[[Tensor, torch.Generator | None], object]
"""Writes the initial value into a tensor, with random numbers of the generator (None: torch's default one)."""


def zeros(value: Tensor, generator: torch.Generator | None = None) -> None:
    value.zero_()


def ones(value: Tensor, generator: torch.Generator | None = None) -> None:
    value.fill_(1)


def even_shares(value: Tensor, generator: torch.Generator | None = None) -> None:
    """1/n in each of n elements."""
    value.fill_(1 / value.shape[0])


def xavier_uniform(value: Tensor, generator: torch.Generator | None = None) -> None:
    """A convolution counts as a linear layer on its patch."""
    nn.init.xavier_uniform_(value.view(value.shape[0], -1), generator=generator)


def xavier_uniform_halves(value: Tensor, generator: torch.Generator | None = None) -> None:
    """Two matrices stacked in dimension 0, each of which starts as a matrix of its own."""
    for half in value.chunk(2):
        xavier_uniform(half, generator)


def kaiming_uniform(value: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform within ±1/√(input width), which is torch's default for a linear layer."""
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def random_directions(value: Tensor, generator: torch.Generator | None = None) -> None:
    """Vectors of length 1 in the last dimension, evenly spread over all directions."""
    value.normal_(generator=generator)
    value.copy_(nn.functional.normalize(value, dim=-1))


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0. A class and not a closure, so that modules can be pickled."""

    std: float

    def __call__(self, value: Tensor, generator: torch.Generator | None = None) -> None:
        value.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class ParameterRule:
    """How a parameter or buffer starts, how tensor parallelism splits it, and what an optimizer must know of it.

    Attributes:
        initialize: writes the initial value.
        split: over tensor-parallel ranks; None: every rank has all of it.
        hidden_matrices: how many matrices between hidden activations are stacked in the rows of the tensor (of one
            expert's part of it), which Muon orthogonalises one by one; 0 for all other parameters: biases, norms,
            embeddings, prototypes, gates, modulation and output layers.
    """

    initialize: Initializer
    split: Split | None = None
    hidden_matrices: int = 0


class InitialValueError(UserError):
    """A parameter or buffer whose module does not define its initial value."""


class LogicalModule(nn.Module):
    """Base class of modules with rules for their parameters, and of modules that depend on the mesh.

    Attributes:
        rules: name -> rule, for the parameters and buffers that the module itself has.
        has_experts: dimension 0 of the parameters is the routed experts. A rule then describes one expert: its
            initial value is drawn for each expert separately, and its `split` counts the dimension of experts.
        placed: which ranks have which of these experts; None: consecutive ones.
    """

    rules: ClassVar[Mapping[str, ParameterRule]] = {}
    has_experts: ClassVar[bool] = False
    placed: ExpertPlacement | None = None

    def initialize(self, name: str, value: Tensor, generator: torch.Generator | None = None) -> None:
        """Writes the initial logical value of the parameter or buffer `name`; with `has_experts`, of one expert.

        Subclasses override it for values that depend on more than the shape. Raises InitialValueError for a name
        without a rule.
        """
        if name not in self.rules:
            kind = type(self).__name__
            raise InitialValueError(
                f"{kind}.{name}: has no initial value; add {name!r} to {kind}.rules, or override {kind}.initialize"
            )
        self.rules[name].initialize(value, generator)

    def reset_parameters(self) -> None:
        """Initialises the parameters and buffers of this module and of its submodules, with torch's random numbers.

        Meta tensors are left as they are: a model is also made on the meta device, then `to_empty`, then initialised by
        this. Values are drawn for the shapes that the tensors have, so initialise a module before it is divided over
        ranks.
        """
        for module in self.modules():
            if isinstance(module, LogicalModule):
                module._reset_own_parameters()
            elif (reset := getattr(module, "reset_parameters", None)) is not None:
                reset()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            if not tensor.is_meta:
                for value in tensor if self.has_experts else (tensor,):
                    self.initialize(name, value)

    def set_mesh(self, mesh: Mesh) -> None:
        """Sets what depends on the mesh, such as the ranks that divide the work. The default needs nothing."""


@torch.no_grad()
def initial_value(
    module: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """The initial value of a parameter or buffer of a module, on the CPU, determined by the generator.

    Args:
        module: which has the tensor itself; a module of another library draws it in its `reset_parameters`.
        name: of the tensor in the module.
        shape: the logical shape; of one expert for a module with `has_experts`.
        dtype: of the tensor.
        generator: its seed determines the value.

    Raises InitialValueError if the module does not define the value.
    """
    if isinstance(module, LogicalModule):
        value = torch.empty(shape, dtype=dtype)
        module.initialize(name, value, generator)
        return value
    reset = getattr(type(module), "reset_parameters", None)
    if reset is None:
        raise InitialValueError(
            f"{type(module).__name__}.{name}: has no initial value; define {type(module).__name__}.reset_parameters(),"
            " or derive the class from megapromoe.nn.LogicalModule and give it `rules`"
        )
    # Modules of other libraries draw from torch's default generator, and all their tensors at once.
    module_copy = _empty_copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        reset(module_copy)
    return getattr(module_copy, name).detach()


def _empty_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without its submodules, with uninitialised tensors on the CPU."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = {key: dict(v) if isinstance(v, dict) else v for key, v in module.__dict__.items()}
    copy._modules = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            copy._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copy._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy
