"""Routers: which experts a token is sent to, and with which routing weights.

`diffmoe_router.py` and `guided_routers.py` have more of them; the table of all is `layer.ROUTERS`. A router of one's
own is a subclass of `Router` with the same methods.

Every router takes tokens x (B, S, D) and labels y (B,), which only the classification router uses, and returns a
`RouterOutput`. Scores are computed in float32 (in float64 for float64 tokens), also under autocast. B may be 0: results
are then empty, every loss is 0, and all parameters stay in the autograd graph.

Statistics of a batch (centroids, balance, the choice of DiffMoE) are computed over `Router.statistics_group`: all
data-parallel ranks with `model.batch_scope=global`, this rank with `rank`.

With `model.balance_bias` a router also has the buffer `balance_bias` (E,), which is added to the scores for the choice
of experts alone, and which `balance_bias.py` updates.

A second pass over the same batch, with the same `RoutingCache`, does not choose, communicate or update state again.

Shape letters besides the usual ones: Q tokens that an expert takes of each image, M MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.collectives import differentiable_all_reduce
from megapromoe.distributed.mesh import SINGLE_RANK, Group, Mesh
from megapromoe.nn.logical_module import (
    LogicalModule,
    Normal,
    ParameterRule,
    kaiming_uniform,
    xavier_uniform,
    zeros,
)
from megapromoe.nn.moe.assignment import (
    TokenAssignment,
    expert_choice,
    rows_per_expert,
    token_choice,
    top_k,
)
from megapromoe.nn.moe.auxiliary import JointLoss
from megapromoe.nn.moe.prototypes import (
    ContrastiveInputs,
    CosineScores,
    contrastive_loss,
    cosine_scores,
    differentiable,
    differentiable_chosen,
    router_precision,
)
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.planning import cost


class RouterOutput(NamedTuple):
    """What a router decides for a batch; see `MoEAuxiliary` for the fields besides the assignment."""

    assignment: TokenAssignment
    """The rows (token, expert, routing weight) over the B·S tokens."""
    losses: Mapping[str, Tensor]
    joint_losses: Mapping[str, JointLoss]
    load_E: Tensor
    mean_weight: Tensor


class Router(LogicalModule):
    """Base class of routers.

    A subclass defines `forward`, and gives its parameters and buffers `rules`. Parameters are replicated over the ranks
    of a tensor-parallel group, which route the same tokens and must decide the same. Buffers are saved in checkpoints,
    and must be equal on all ranks.

    Attributes:
        config: options of the layer.
        num_experts: routed experts E.
        statistics_group: the ranks over which statistics of a batch are computed.
    """

    statistics_group: Group = SINGLE_RANK
    balance_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        if config.balance_bias:
            self.register_buffer("balance_bias", torch.zeros(config.num_experts))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator | None = None) -> None:
        if name == "balance_bias":
            zeros(value)
        else:
            super().initialize(name, value, generator)

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        """Assigns experts to tokens.

        Args:
            x_BSD: tokens of the images that are routed, B of which may be 0.
            y_B: their labels, int64.
            routing_cache: the decisions of an earlier pass over the same batch; its methods are used for the choice of
                experts, for collectives and for updates of state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    @classmethod
    def planned_layers(cls, config: ModelConfig) -> list[cost.Linear]:
        """The parameters and products of the router of one layer, for plans, counts and utilisation.

        The default is a product of tokens and experts without bias. Routers of `ROUTERS` are in `planning/cost.py`,
        which imports no torch.
        """
        return [cost.Linear("router", config.hidden_size, config.num_experts, 1, config.tokens, bias=False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `nn.Module`, but float32 buffers keep their precision: in bfloat16 a running mean would not change."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            current = self._buffers[name]
            if buffer is None or current is None or buffer.dtype != torch.float32:
                continue
            if torch.finfo(current.dtype).bits < 32:
                self._buffers[name] = buffer.to(current.device)
        return self

    def set_mesh(self, mesh: Mesh) -> None:
        self.statistics_group = mesh.dp if self.config.batch_scope == "global" else SINGLE_RANK

    def output(
        self,
        assignment: TokenAssignment,
        losses: Mapping[str, Tensor],
        load_E: Tensor | None = None,
        joint_losses: Mapping[str, JointLoss] | None = None,
    ) -> RouterOutput:
        """Adds the statistics.

        Args:
            assignment: the rows.
            losses: name -> weighted scalar.
            load_E: rows of each expert, float32, if they are known already.
            joint_losses: losses that are computed for all layers together.
        """
        expert_R, weight_R = assignment.expert_R, assignment.weight_R
        with torch.no_grad():
            load_E = rows_per_expert(expert_R, self.num_experts).float() if load_E is None else load_E
            mean_weight = weight_R.sum(dtype=torch.float32) / max(weight_R.shape[0], 1)
        return RouterOutput(assignment, losses, joint_losses or {}, load_E, mean_weight)

    def routing_weights(self, score: Tensor, softmax_dim: int = -1) -> Tensor:
        """Routing weights from scores, of the same shape; they are not renormalised over the chosen experts.

        `softmax_dim`: the dimension of a softmax (`model.score_function=softmax`): experts if tokens choose,
        the tokens of an image if experts choose.
        """
        if self.config.score_function == "identity":
            return score
        return score.sigmoid() if self.config.score_function == "sigmoid" else score.softmax(softmax_dim)

    def biased(self, score: Tensor) -> Tensor:
        """The scores (..., E) by which experts are chosen: those given, plus the balance bias if there is one."""
        return score + self.balance_bias if self.config.balance_bias else score

    def probabilities(self, weight: Tensor) -> Tensor:
        """Each token's distribution over experts for the balance loss, from its weights (..., E) for all experts.

        Softmax weights are a distribution already; others pass through a softmax. Source: the ProMoE release.
        """
        return weight if self.config.score_function == "softmax" else weight.softmax(-1)

    def balance_loss(self, p_BSE: Tensor, chosen_BSK: Tensor, routing_cache: RoutingCache) -> Tensor:
        """The weighted loss α·Σ_e P_e·f_e, over the batch or per image and averaged (`model.balance_form`).

        Args:
            p_BSE: each token's distribution over experts; P_e is its mean.
            chosen_BSK: the experts of each token; f_e is E times the fraction of them that are e.
        """
        ones = torch.ones_like(chosen_BSK, dtype=torch.float32)
        count_BSE = torch.zeros_like(p_BSE).scatter_add_(-1, chosen_BSK, ones)
        if self.config.balance_form == "batch":
            count_E, p_E = count_BSE.sum((0, 1)), p_BSE.sum((0, 1))
            packed = _with_number(torch.cat([count_E, p_E]), p_BSE.shape[0] * p_BSE.shape[1])
            packed = self.sum_over_group("balance", packed, routing_cache)
            count_E, p_E, tokens = packed[: self.num_experts], packed[self.num_experts : -1], packed[-1].clamp(min=1)
            f_E = self.num_experts * count_E / (tokens * self.config.top_k)
            return self.config.balance_weight * (f_E.detach() * p_E / tokens).sum()
        f_BE = self.num_experts * count_BSE.mean(1) / self.config.top_k
        loss_B = (f_BE * p_BSE.mean(1)).sum(-1)
        return self.config.balance_weight * self.mean_over_images("balance", loss_B, routing_cache)

    def mean_over_images(self, name: str, value_B: Tensor, routing_cache: RoutingCache) -> Tensor:
        """Mean over the images of the statistics group, scalar; 0 if it has none."""
        packed = _with_number(value_B.sum()[None], value_B.shape[0])
        total, images = self.sum_over_group(name, packed, routing_cache)
        return total / images.clamp(min=1)

    def sum_over_group(self, name: str, x: Tensor, routing_cache: RoutingCache) -> Tensor:
        """Differentiable sum over the statistics group, communicated once for a batch under this name."""
        return routing_cache.get_or_compute(name, lambda: differentiable_all_reduce(x, self.statistics_group))


def _with_number(x_N: Tensor, number: int) -> Tensor:
    """Appends a number of the host to a vector, (N + 1,).

    The number becomes an argument of a kernel. A tensor made from it would be copied to a GPU, for which the host
    waits and which a CUDA graph cannot capture.
    """
    if torch.compiler.is_compiling():  # the number may be symbolic, which pad does not take
        return torch.cat([x_N, x_N.new_full((1,), float(number))])
    return F.pad(x_N, (0, 1), value=float(number))


class PrototypeRouter(Router):
    """ProMoE by token choice: a token goes to the K experts whose prototypes have the largest cosines with it.

    Source: ProMoE, arXiv 2510.24711, "Prototypical routing" and "Routing contrastive learning".
    """

    rules = {"prototypes": ParameterRule(Normal(0.02))}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.prototypes = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.reset_parameters()

    def scores(self, x: Tensor) -> CosineScores:
        """Cosines of tokens (..., D) with this layer's prototypes, without gradients."""
        return cosine_scores(x, self.prototypes)

    def choose(self, score_BSE: Tensor) -> Tensor:
        """The experts (B, S, K) of each token, int64, best first."""
        return top_k(score_BSE, self.config.top_k)

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        scores = self.scores(x_BSD)
        chosen_BSK = routing_cache.get_or_compute("chosen", lambda: self.choose(self.biased(scores.score)))

        has_contrastive_loss = self.training and bool(self.config.rcl_weight)
        counts_all = self.config.rcl_tokens == "all" or self.config.top_k == 1
        num_summed = (chosen_BSK.shape[-1] if counts_all else 1) if has_contrastive_loss else 0
        has_balance_loss = self.training and bool(self.config.balance_weight)
        uses_all_scores = has_balance_loss or self.config.score_function == "softmax"
        losses = {}
        if torch.compiler.is_compiling() and not uses_all_scores:
            # The gradient of the other scores is zero, so that a product is saved in backward.
            score_BSK, sum_ED, count_E = differentiable_chosen(x_BSD, self.prototypes, scores, chosen_BSK, num_summed)
            assignment = token_choice(chosen_BSK, self.routing_weights(score_BSK))
        else:
            summed = chosen_BSK[..., :num_summed] if num_summed else None
            score_BSE, sum_ED, count_E = differentiable(x_BSD, self.prototypes, scores, summed)
            weight_BSE = self.routing_weights(score_BSE)
            assignment = token_choice(chosen_BSK, weight_BSE.gather(-1, chosen_BSK))
            if has_balance_loss:
                losses["balance"] = self.balance_loss(self.probabilities(weight_BSE), chosen_BSK, routing_cache)
        joint_losses: dict[str, JointLoss] = {}
        if sum_ED is not None and count_E is not None:
            inputs = self.prototypes.double(), sum_ED, count_E
            settings = self.config.rcl_weight, self.config.rcl_temperature, self.statistics_group
            joint_losses["rcl"] = ContrastiveInputs(*inputs, *settings)
        return self.output(assignment, losses, count_E if counts_all else None, joint_losses)


class PrototypeExpertChoiceRouter(PrototypeRouter):
    """ProMoE by expert choice: each expert takes the int(S/E·K) tokens (at least one) of each image most like it.

    The contrastive loss is computed for each image and averaged. A softmax of the scores is over the tokens of an
    image. Source: ProMoE, arXiv 2510.24711, expert-choice variant.
    """

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        B, S, D = x_BSD.shape
        scores = self.scores(x_BSD)
        score_BES, Q = scores.score.transpose(1, 2), self.config.tokens_per_expert(S)
        chosen_BEQ = routing_cache.get_or_compute("chosen", lambda: score_BES.topk(Q, dim=-1).indices)
        score_BSE, _, _ = differentiable(x_BSD, self.prototypes, scores)
        weight_BEQ = self.routing_weights(score_BSE, softmax_dim=1).transpose(1, 2).gather(-1, chosen_BEQ)
        assignment = expert_choice(chosen_BEQ, weight_BEQ, S)
        losses = {}
        if self.training and self.config.rcl_weight:
            rows_BRD = router_precision(x_BSD).gather(1, chosen_BEQ.flatten(1).unsqueeze(-1).expand(-1, -1, D))
            sum_BED = rows_BRD.view(B, self.num_experts, Q, D).sum(2)
            count_BE = sum_BED.new_full((B, self.num_experts), Q)
            loss_B = contrastive_loss(self.prototypes, sum_BED, count_BE, self.config.rcl_temperature)
            losses["rcl"] = self.config.rcl_weight * self.mean_over_images("rcl", loss_B, routing_cache)
        return self.output(assignment, losses)


class LinearRouter(Router):
    """Softmax of a linear layer without bias; a token takes its top-K experts, weights not renormalised.

    With `model.router=promoe_linear` this is ProMoE's two-step router without prototypes. That is not published; its
    gate starts like other matrices.
    """

    rules = {"gate": ParameterRule(xavier_uniform)}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.reset_parameters()

    def scores(self, x_BSD: Tensor) -> Tensor:
        """Softmax scores (B, S, E), float32."""
        return F.linear(router_precision(x_BSD), router_precision(self.gate)).softmax(-1)

    def choose(self, score_BSE: Tensor) -> Tensor:
        """The experts (B, S, K) of each token, int64, best first."""
        return top_k(score_BSE, self.config.top_k)

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        score_BSE = self.scores(x_BSD)
        chosen_BSK = routing_cache.get_or_compute("chosen", lambda: self.choose(self.biased(score_BSE.detach())))
        assignment = token_choice(chosen_BSK, score_BSE.gather(-1, chosen_BSK))
        losses = {}
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance_loss(score_BSE, chosen_BSK, routing_cache)
        return self.output(assignment, losses)


class TokenChoiceRouter(LinearRouter):
    """TC-DiT: the same routing without a shared and an unconditional expert, and another start."""

    rules = {"gate": ParameterRule(kaiming_uniform)}


class ExpertChoiceRouter(LinearRouter):
    """EC-DiT: each expert takes its int(S/E·K) best tokens of each image. Source: arXiv 2410.02098."""

    rules = {"gate": ParameterRule(Normal(0.006))}

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        S = x_BSD.shape[1]
        score_BES, Q = self.scores(x_BSD).transpose(1, 2), self.config.tokens_per_expert(S)
        chosen_BEQ = routing_cache.get_or_compute("chosen", lambda: score_BES.detach().topk(Q, dim=-1).indices)
        return self.output(expert_choice(chosen_BEQ, score_BES.gather(-1, chosen_BEQ), S), {})
