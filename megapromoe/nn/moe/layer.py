"""The mixture-of-experts layer, which replaces the MLP of a block.

Output: shared(x) + Σ weight·expert(x) for the tokens of conditional images, shared(x) + unconditional(x) for those of
null images. With several shared or unconditional experts, their outputs are summed. Null images are the last of a batch
and their number is known on the host, so the unconditional expert runs on a slice and its tokens are never dispatched.

The layer has two steps, `route` and `run_experts`, which `forward` calls one after the other. A block that recomputes
activations calls them separately, because routing must not be repeated.

Source: ProMoE, arXiv 2510.24711, "Two-step router".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn

from megapromoe.config import extensions
from megapromoe.config.layer_options import LAYER_FIELDS, LayerOptions, layer_config
from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.nn.activations import swiglu
from megapromoe.nn.layers import Mlp, SummedMlps
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.capacity_dispatcher import CapacityDispatcher
from megapromoe.nn.moe.diffmoe_router import DiffMoERouter
from megapromoe.nn.moe.dispatcher import Dispatcher, ExpertParallelDispatcher
from megapromoe.nn.moe.expert_linear import ExpertDownLinear, ExpertGateUpLinear, ExpertLinear, ExpertOffsets
from megapromoe.nn.moe.guided_routers import ClassificationRouter, KMeansRouter
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.routers import (
    ExpertChoiceRouter,
    LinearRouter,
    PrototypeExpertChoiceRouter,
    PrototypeRouter,
    Router,
    RouterOutput,
    TokenChoiceRouter,
)
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.tensor_parallel import RegionModule

ROUTERS: Mapping[str, type[Router]] = {
    "promoe": PrototypeRouter,
    "promoe_ec": PrototypeExpertChoiceRouter,
    "promoe_linear": LinearRouter,
    "tc": TokenChoiceRouter,
    "ec": ExpertChoiceRouter,
    "diffmoe": DiffMoERouter,
    "classification": ClassificationRouter,
    "kmeans": KMeansRouter,
}
"""`model.router` -> class."""


def router_class(router: str) -> type[Router]:
    """The class that a value of `model.router` names.

    Raises ExtensionError if a user's router cannot be loaded, has changed, or is no subclass of `Router`.
    """
    if router in ROUTERS:
        return ROUTERS[router]
    loaded = extensions.ROUTER.load(router)
    if not (isinstance(loaded, type) and issubclass(loaded, Router)):
        raise extensions.ExtensionError(f"model.router = {router!r}: must be a subclass of megapromoe.nn.Router")
    return loaded


class ExpertInputs(NamedTuple):
    """What `MoE.run_experts` takes: the decision of `MoE.route` for these tokens."""

    x_BSD: Tensor
    """The tokens of all images, connected to the graph such that backward takes few operators."""
    assignment: TokenAssignment
    """The rows of the routed images."""
    num_routed_images: int
    """How many images, the first ones, are routed."""


class Experts(nn.Module):
    """The routed experts of one rank, each an MLP as `Mlp` is, with stacked parameters."""

    def __init__(self, experts: int, width: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.is_swiglu = activation == "swiglu"
        if self.is_swiglu:
            self.fc1: ExpertLinear = ExpertGateUpLinear(experts, width, 2 * hidden)
        else:
            self.fc1 = ExpertLinear(experts, width, hidden, gelu=True)
        self.fc2 = ExpertDownLinear(experts, hidden, width)

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """Rows (R, D) sorted by expert -> (R, D); see `ExpertLinear`."""
        hidden_RF = self.fc1(x_RD, offsets)
        return self.fc2(swiglu(hidden_RF) if self.is_swiglu else hidden_RF, offsets)


class MoE(RegionModule):
    """Router, routed experts, shared and unconditional experts.

    The layer is one region: tensor parallelism divides the columns of the dense experts and the rows of the routed
    ones.

    `output, auxiliary = moe(x, num_conditional=n)`: the auxiliary output has the losses, which must be added to the
    loss of the model (`auxiliary_loss`), and what the layer did, for logs. The layer keeps nothing of a call.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        router: str | type[Router] = "promoe",
        **options: Unpack[LayerOptions],
    ) -> None:
        """Makes a layer with initial values.

        Args:
            hidden_size: channels D of a token.
            num_experts: routed experts E.
            router: a name in `ROUTERS`, a subclass of `Router`, or what names one (`config/extensions.py`).
            options: the other options of `ModelConfig` that concern the layer, by the same names: `top_k`,
                `expert_width`, `score_function`, `rcl_weight`, `capacity_factor` ...

        Raises LayerError, listing everything that is wrong with them.
        """
        super().__init__()
        name = router if isinstance(router, str) else f"{router.__module__}:{router.__qualname__}"
        sizes = {"hidden_size": hidden_size, "num_experts": num_experts}
        config = layer_config(name, sizes | dict(options), is_class=not isinstance(router, str))
        D, width = config.hidden_size, config.moe_width
        self.config = config
        self.router = (router_class(router) if isinstance(router, str) else router)(config)
        self.experts = Experts(config.num_experts, D, width, config.activation)
        self.shared = _dense_experts(config.shared_experts, D, config.shared_width, config.activation)
        self.unconditional = _dense_experts(config.unconditional_experts, D, width, config.activation)
        self.dispatcher: Dispatcher
        self.set_mesh(UNSHARDED)

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """The layer of a model with this configuration."""
        return cls(router=config.router, **{name: getattr(config, name) for name in LAYER_FIELDS})

    def set_mesh(self, mesh: Mesh) -> None:
        super().set_mesh(mesh)
        num_experts, factor = self.config.num_experts, self.config.capacity_factor
        if mesh.ep.size > num_experts:
            raise ValueError(f"ep = {mesh.ep.size}: must be at most num_experts = {num_experts}")
        if factor:
            self.dispatcher = CapacityDispatcher(num_experts, mesh.ep, factor, self.region, mesh.expert_tp)
        elif mesh.ep.size > 1:
            self.dispatcher = ExpertParallelDispatcher(num_experts, mesh.ep, self.region, mesh.expert_tp)
        else:
            self.dispatcher = Dispatcher(num_experts, self.region, mesh.expert_tp)

    def forward(
        self,
        x: Tensor,
        num_conditional: int | None = None,
        y: Tensor | None = None,
        routing_cache: RoutingCache | None = None,
    ) -> tuple[Tensor, MoEAuxiliary]:
        """Applies the layer.

        Args:
            x: tokens (B, S, D) of B images, or (S, D) of one; those of conditional images first.
            num_conditional: how many images are conditional; None: all. The others are null images, whose tokens visit
                the unconditional experts.
            y: the labels (B,) of the images, int64; only the classification router needs them, in training.
            routing_cache: one for each batch, if activations are recomputed: the second pass over the batch then routes
                as the first, and does not communicate statistics or train the state of the router again.

        Returns:
            the output, shaped as x, without the residual connection; and what the layer did.

        Raises ValueError if the shapes do not fit or `num_conditional` is not between 0 and B.
        """
        x_BSD = x.unsqueeze(0) if x.dim() == 2 else x
        inputs, routed = self.route(
            x_BSD, x_BSD.shape[0] if num_conditional is None else num_conditional, y, routing_cache
        )
        y_BSD, dropped = self.run_experts(*inputs)
        return y_BSD.view(x.shape), auxiliary_of(routed, dropped)

    def route(
        self,
        x_BSD: Tensor,
        num_conditional: int,
        y_B: Tensor | None = None,
        routing_cache: RoutingCache | None = None,
    ) -> tuple[ExpertInputs, RouterOutput]:
        """The first step: assigns experts to the tokens of the routed images.

        Args:
            x_BSD: tokens of all images, those of conditional images first.
            num_conditional: how many images are not null.
            y_B: the labels of all images.
            routing_cache: the decisions of an earlier pass over the same batch.

        Returns:
            the arguments of `run_experts`, and the output of the router.
        """
        self._check(x_BSD, num_conditional, y_B)
        # Without an unconditional expert all images are routed.
        images = x_BSD.shape[0] if self.unconditional is None else num_conditional
        x_BSD, routed_BSD, _ = split_conditional(x_BSD, images)
        labels_B = None if y_B is None else y_B[:images]
        if _autocast_dtype(x_BSD):  # routers compute in float32: rounding could change their choice
            with torch.autocast(x_BSD.device.type, enabled=False):
                routed = self.router(router_precision(routed_BSD), labels_B, routing_cache)
        else:
            routed = self.router(routed_BSD, labels_B, routing_cache)
        return ExpertInputs(x_BSD, routed.assignment, images), routed

    def run_experts(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_routed_images: int
    ) -> tuple[Tensor, Tensor | None]:
        """The second step: applies the experts; the arguments are the fields of `ExpertInputs`.

        Returns:
            the output (B, S, D), and the share of this rank's rows that were dropped, None if none can be.
        """
        if dtype := _autocast_dtype(x_BSD):
            x_BSD = x_BSD.to(dtype)
        B, S, D = x_BSD.shape
        x_TD = self.region.copy_to_region(x_BSD).reshape(B * S, D)
        num_routed_tokens = num_routed_images * S
        x_TD, routed_TD, null_TD = split_conditional(x_TD, num_routed_tokens)

        # The shared and the unconditional experts run between the calls of the dispatcher and overlap communication.
        dispatched = self.dispatcher.dispatch(routed_TD, assignment, B * S)
        shared, unconditional = mlps_of(self.shared), mlps_of(self.unconditional)
        hidden = [mlp.hidden(x_TD) for mlp in shared]
        null_hidden = [mlp.hidden(null_TD) for mlp in unconditional]
        expert_outputs = self.dispatcher.run_experts(dispatched, self.experts)
        bias, null_bias = None, None
        if shared:
            y_TD, bias = _partial_sum(shared, hidden)
        else:
            y_TD = torch.zeros_like(x_TD)
        if unconditional:
            null_TD, null_bias = _partial_sum(unconditional, null_hidden)
        if torch.compiler.is_compiling() and not self.region.is_sharded:  # it fuses both parts with what follows
            rest_TD = y_TD[num_routed_tokens:]
            rest_TD = rest_TD + null_TD if unconditional else rest_TD
            y_TD = torch.cat([self.dispatcher.combine(expert_outputs, y_TD[:num_routed_tokens]), rest_TD])
        else:
            y_TD = _AddFrom.apply(y_TD, null_TD, num_routed_tokens) if unconditional else y_TD
            y_TD = self.dispatcher.combine(expert_outputs, y_TD)
        y_TD = self.region.reduce_from_region(y_TD)
        if bias is not None:
            y_TD = y_TD + bias
        if null_bias is not None:
            y_TD = torch.cat([y_TD[:num_routed_tokens], y_TD[num_routed_tokens:] + null_bias])
        return y_TD.view(B, S, D), expert_outputs.dropped

    def _check(self, x_BSD: Tensor, num_conditional: int, y_B: Tensor | None) -> None:
        D = self.config.hidden_size
        if x_BSD.dim() != 3 or x_BSD.shape[2] != D:
            raise ValueError(f"x has the shape {tuple(x_BSD.shape)}: must be (images, tokens, {D}) or (tokens, {D})")
        B = x_BSD.shape[0]
        if not 0 <= num_conditional <= B:
            raise ValueError(f"num_conditional = {num_conditional}: must be between 0 and {B}, the images of x")
        if y_B is not None and y_B.shape != (B,):
            raise ValueError(f"y has the shape {tuple(y_B.shape)}: must be ({B},), a label for each image of x")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of x; None if autocast is off."""
    device = x.device.type
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 cannot trace it.
    is_enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_enabled else None


def auxiliary_of(routed: RouterOutput, dropped: Tensor | None) -> MoEAuxiliary:
    """What a layer returns besides its output, from the results of its two steps."""
    return MoEAuxiliary(routed.losses, routed.joint_losses, routed.load_E, routed.mean_weight, dropped)


def _dense_experts(count: int, hidden: int, width: int, activation: str) -> Mlp | SummedMlps | None:
    """`count` shared or unconditional experts.

    A single expert is an `Mlp`, not a `SummedMlps`: older checkpoints have its parameters under these names.
    """
    if count > 1:
        return SummedMlps(Mlp(hidden, width, activation) for _ in range(count))
    return Mlp(hidden, width, activation) if count else None


def mlps_of(experts: Mlp | SummedMlps | None) -> list[Mlp]:
    """The MLPs of `MoE.shared` or `MoE.unconditional`."""
    if experts is None:
        return []
    return [experts] if isinstance(experts, Mlp) else [mlp for mlp in experts if isinstance(mlp, Mlp)]


def _partial_sum(mlps: list[Mlp], hidden: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The summed partial outputs of MLPs with the given hidden values, and the sum of the biases not added yet."""
    y, bias = mlps[0].partial(hidden[0])
    for mlp, mlp_hidden in zip(mlps[1:], hidden[1:], strict=True):
        mlp_output, mlp_bias = mlp.partial(mlp_hidden)
        y = y + mlp_output
        bias = mlp_bias if bias is None or mlp_bias is None else bias + mlp_bias
    return y, bias


def split_conditional(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, its first `count` rows and its other rows, with a cheaper backward than slicing has.

    Backward adds the gradients of the two parts in place to that of x. Autograd would first write each part into zeros
    of the size of x. The gradient of x must therefore be a tensor that nothing else uses: the layers that get x as a
    whole must compute a new one, as linear layers do.
    """
    if torch.compiler.is_compiling():  # it fuses the backward of slices, and `count` may not be known to it
        return x, x[:count], x[count:]
    return _SplitConditional.apply(x, count) if count < x.shape[0] else (x, x, x[count:])


class _SplitConditional(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count, ctx.shape = count, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:count], x[count:]

    @staticmethod
    def backward(ctx, grad, grad_first, grad_rest):
        if grad is None and grad_first is not None and grad_rest is not None:
            return torch.cat([grad_first, grad_rest]), None
        if grad is None:  # neither x as a whole nor one of its parts was used
            grad = (grad_rest if grad_first is None else grad_first).new_zeros(ctx.shape)
        if grad_first is not None:
            grad[: ctx.count].add_(grad_first)
        if grad_rest is not None:
            grad[ctx.count :].add_(grad_rest)
        return grad, None


class _AddFrom(torch.autograd.Function):
    """Adds rows to the rows of `x_TD` from index `start` on, in place."""

    @staticmethod
    def forward(ctx, x_TD, rows_RD, start):
        x_TD[start:].add_(rows_RD)
        ctx.mark_dirty(x_TD)
        ctx.start = start
        return x_TD

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD, grad_TD[ctx.start :], None
