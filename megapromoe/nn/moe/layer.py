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
from torch import Tensor

from megapromoe.config import extensions
from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.config.layer_options import LAYER_FIELDS, LayerOptions, layer_config
from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.distributed.parameter_layout import placement_over
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.capacity_dispatcher import CapacityDispatcher
from megapromoe.nn.moe.dense_experts import (
    AddFrom,
    Biases,
    DenseHidden,
    DenseOutputs,
    add_biases,
    dense_experts,
    mlps_of,
    partial_sum,
    split_conditional,
)
from megapromoe.nn.moe.diffmoe_router import DiffMoERouter
from megapromoe.nn.moe.dispatcher import Dispatcher, ExpertOutputs, LocalOutputs
from megapromoe.nn.moe.expert_linear import (
    Experts,
    autocast_dtype,
    expert_precision,
)
from megapromoe.nn.moe.expert_parallel_dispatcher import ExpertParallelDispatcher
from megapromoe.nn.moe.guided_routers import ClassificationRouter, KMeansRouter
from megapromoe.nn.moe.mixture_router import MixtureRouter
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.race_router import RaceRouter
from megapromoe.nn.moe.replicas import ReplicaExchange
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
from megapromoe.nn.moe.row_permutations import add_token_sums
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
    "gmm": MixtureRouter,
    "race": RaceRouter,
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
        self.shared = dense_experts(config.shared_experts, D, config.shared_width, config.activation)
        self.unconditional = dense_experts(config.unconditional_experts, D, width, config.activation)
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
        placement = placement_over(mesh.ep.size, num_experts, self.experts.fc1.placed)
        if factor and placement.replicas:
            raise ValueError(f"capacity_factor = {factor}: must be 0 with copies of experts, whose rows are not fixed")
        self.dispatcher.place_experts(placement, self.experts.fc1.weight.device)
        self.replicas = ReplicaExchange(placement, mesh.ep) if placement.replicas else None

    def place_experts(self, placement: ExpertPlacement | None) -> None:
        """Chooses which expert-parallel ranks have which experts, and copies of others; None: consecutive ones.

        Call it before the layer is divided over ranks, for example by `megapromoe.nn.parallelize`.
        """
        for linear in (self.experts.fc1, self.experts.fc2):
            linear.placed = placement

    def forward(
        self,
        x: Tensor,
        num_conditional: int | None = None,
        y: Tensor | None = None,
        routing_cache: RoutingCache | None = None,
        router_input: Tensor | None = None,
    ) -> tuple[Tensor, MoEAuxiliary]:
        """Applies the layer.

        Args:
            x: tokens (B, S, D) of B images, or (S, D) of one; those of conditional images first.
            num_conditional: how many images are conditional; None: all. The others are null images, whose tokens visit
                the unconditional experts.
            y: the labels (B,) of the images, int64; only the classification router needs them, in training.
            routing_cache: one for each batch, if activations are recomputed: the second pass over the batch then routes
                as the first, and does not communicate statistics or train the state of the router again.
            router_input: tokens that the router scores instead of x, shaped as x; the experts process x.

        Returns:
            the output, shaped as x, without the residual connection; and what the layer did.

        Raises ValueError if the shapes do not fit or `num_conditional` is not between 0 and B.
        """
        x_BSD = x.unsqueeze(0) if x.dim() == 2 else x
        number = x_BSD.shape[0] if num_conditional is None else num_conditional
        if router_input is not None and router_input.shape != x.shape:
            shapes = f"{tuple(router_input.shape)}: must be that of x, {tuple(x.shape)}"
            raise ValueError(f"router_input has the shape {shapes}")
        scored_BSD = None if router_input is None else router_input.view(x_BSD.shape)
        inputs, routed = self.route(x_BSD, number, y, routing_cache, scored_BSD)
        y_BSD, dropped = self.run_experts(*inputs)
        return y_BSD.view(x.shape), auxiliary_of(routed, dropped)

    def route(
        self,
        x_BSD: Tensor,
        num_conditional: int,
        y_B: Tensor | None = None,
        routing_cache: RoutingCache | None = None,
        scored_BSD: Tensor | None = None,
    ) -> tuple[ExpertInputs, RouterOutput]:
        """The first step: assigns experts to the tokens of the routed images.

        Args:
            x_BSD: tokens of all images, those of conditional images first.
            num_conditional: how many images are not null.
            y_B: the labels of all images.
            routing_cache: the decisions of an earlier pass over the same batch.
            scored_BSD: the tokens that the router scores; None: x_BSD.

        Returns:
            the arguments of `run_experts`, and the output of the router.
        """
        self._check(x_BSD, num_conditional, y_B)
        # Without an unconditional expert all images are routed.
        images = x_BSD.shape[0] if self.unconditional is None else num_conditional
        if scored_BSD is not None:
            routed_BSD = scored_BSD[:images]
        elif torch.compiler.is_compiling():  # it fuses the backward of a slice
            routed_BSD = x_BSD[:images]
        else:
            x_BSD, routed_BSD, _ = split_conditional(x_BSD, images)
        labels_B = None if y_B is None else y_B[:images]
        if autocast_dtype(x_BSD):  # routers compute in float32: rounding could change their choice
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
        y_BSD, biases, dropped = self.outputs_and_biases(x_BSD, assignment, num_routed_images)
        B, S, D = y_BSD.shape
        return add_biases(y_BSD.view(B * S, D), biases, num_routed_images * S).view(B, S, D), dropped

    def outputs_and_biases(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_routed_images: int, with_biases: bool = True
    ) -> tuple[Tensor, Biases, Tensor | None]:
        """`run_experts` with the biases of dense experts apart that the output does not contain.

        `with_biases`: the output contains all biases except in a sharded region; otherwise none of the dense experts.
        """
        x_BSD = expert_precision(x_BSD)
        B, S, D = x_BSD.shape
        x_TD = self.region.copy_to_region(x_BSD).reshape(B * S, D)
        num_routed_tokens = num_routed_images * S
        x_TD, routed_TD, null_TD = split_conditional(x_TD, num_routed_tokens)

        # The shared and the unconditional experts run between the calls of the dispatcher and overlap communication.
        # Copies of experts are sent before the rows, whose number must first be known.
        experts = self.experts if self.replicas is None else self.replicas.start(self.experts, x_TD.dtype)
        dispatched = self.dispatcher.dispatch(routed_TD, assignment, B * S)
        hidden = self.dense_hidden(x_TD, null_TD)
        expert_outputs = self.dispatcher.run_experts(dispatched, experts)
        dense = self.dense_outputs(x_TD, hidden, with_biases)
        y_TD = self.region.reduce_from_region(self.combine(expert_outputs, dense, num_routed_tokens, S))
        return y_TD.view(B, S, D), dense.biases, expert_outputs.dropped

    # The steps of `run_experts` that send nothing; `nn/compiled_parts.py` compiles them.

    def dense_hidden(self, x_TD: Tensor, null_TD: Tensor) -> DenseHidden:
        """The first half of the shared and of the unconditional experts. Args: all tokens, those of null images."""
        unconditional = [mlp.hidden(null_TD) for mlp in mlps_of(self.unconditional)]
        return DenseHidden([mlp.hidden(x_TD) for mlp in mlps_of(self.shared)], unconditional)

    def dense_outputs(self, x_TD: Tensor, hidden: DenseHidden, with_biases: bool = True) -> DenseOutputs:
        """The second half; `with_biases`: see `outputs_and_biases`."""
        shared, unconditional = mlps_of(self.shared), mlps_of(self.unconditional)
        null_TD, null_bias = None, None
        y_TD, bias = partial_sum(shared, hidden.shared, with_biases) if shared else (torch.zeros_like(x_TD), None)
        if unconditional:
            null_TD, null_bias = partial_sum(unconditional, hidden.unconditional, with_biases)
        return DenseOutputs(y_TD, null_TD, Biases(bias, null_bias))

    def combine(
        self, expert_outputs: ExpertOutputs, dense: DenseOutputs, num_routed_tokens: int, S: int | None = None
    ) -> Tensor:
        """The sum of all outputs (T, D), without `dense.biases`; in a sharded region a partial sum.

        `S`: the tokens of an image, of which all are on this rank or none; None: images may be divided over ranks.
        """
        y_TD, null_TD = dense.y_TD, dense.null_TD
        if torch.compiler.is_compiling():  # it fuses both parts with what follows
            if expert_outputs.metadata.token_R is None:
                rows, metadata = expert_outputs.rows, expert_outputs.metadata
                if isinstance(rows, LocalOutputs):
                    y_RD, biases = rows.rows_and_biases()
                else:
                    y_RD, biases = rows.combine_rows(), None
                return add_token_sums(y_TD, y_RD, biases, null_TD, metadata, (num_routed_tokens, S))
            rest_TD = y_TD[num_routed_tokens:]
            rest_TD = rest_TD if null_TD is None else rest_TD + null_TD
            return torch.cat([self.dispatcher.combine(expert_outputs, y_TD[:num_routed_tokens]), rest_TD])
        y_TD = y_TD if null_TD is None else AddFrom.apply(y_TD, null_TD, num_routed_tokens)
        return self.dispatcher.combine(expert_outputs, y_TD)

    def _check(self, x_BSD: Tensor, num_conditional: int, y_B: Tensor | None) -> None:
        D = self.config.hidden_size
        if x_BSD.dim() != 3 or x_BSD.shape[2] != D:
            raise ValueError(f"x has the shape {tuple(x_BSD.shape)}: must be (images, tokens, {D}) or (tokens, {D})")
        B = x_BSD.shape[0]
        if not 0 <= num_conditional <= B:
            raise ValueError(f"num_conditional = {num_conditional}: must be between 0 and {B}, the images of x")
        if y_B is not None and y_B.shape != (B,):
            raise ValueError(f"y has the shape {tuple(y_B.shape)}: must be ({B},), a label for each image of x")


def auxiliary_of(routed: RouterOutput, dropped: Tensor | None) -> MoEAuxiliary:
    """What a layer returns besides its output, from the results of its two steps."""
    return MoEAuxiliary(routed.losses, routed.joint_losses, routed.load_E, routed.mean_weight, dropped)
