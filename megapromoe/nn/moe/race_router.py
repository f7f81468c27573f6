"""Expert Race: all pairs of a token and an expert of a batch compete for the places of the experts.

Source: "Expert Race: A Flexible Routing Strategy for Scaling Diffusion Transformer with Mixture of Experts", arXiv
2503.16057.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.collectives import differentiable_all_reduce
from megapromoe.distributed.mesh import SINGLE_RANK, Group, Mesh
from megapromoe.nn.logical_module import ParameterRule, xavier_uniform, zeros
from megapromoe.nn.moe.assignment import mask_choice
from megapromoe.nn.moe.auxiliary import JointLoss
from megapromoe.nn.moe.batch_choice import best_pairs, gather_tokens, tokens_of_rank
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.routers import Router, RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache


class SimilarityInputs(NamedTuple):
    """What the router similarity loss of one layer is computed from; a `JointLoss`.

    With P (T, E) the softmax of a token's logits over experts, and M (T, E) the mask of the chosen pairs,

        L = weight / T · Σ_ij W_ij (PᵀP)_ij,
        W_ii = E (MᵀM)_ii / Σ_i (MᵀM)_ii,   W_ij = (E² - E) (MᵀM)_ij / Σ_i≠j (MᵀM)_ij for i ≠ j.

    The diagonal balances single experts, the rest pairs of experts. Without any pair of experts that have a token in
    common, the second part is 0. Gradients reach the logits by P alone.

    Source: arXiv 2503.16057, section 5, equations 9 to 11.
    """

    probability_EE: Tensor
    """PᵀP / T of this rank's tokens, float32; T tokens of all ranks."""
    chosen_EE: Tensor
    """MᵀM of this rank's tokens, float32."""
    weight: float
    """Factor of the loss."""
    group: Group
    """The ranks over whose tokens the loss is computed."""

    @property
    def joint_key(self) -> Hashable:
        return type(self), self.chosen_EE.shape, self.chosen_EE.dtype, self.weight, self.group

    @staticmethod
    def joint_loss(layers: Sequence[SimilarityInputs]) -> Tensor:
        """The weighted losses (M,) of M layers over the tokens of all ranks. Collective."""
        first = layers[0]
        packed = torch.stack([torch.stack([layer.probability_EE, layer.chosen_EE]) for layer in layers])
        probability_MEE, chosen_MEE = differentiable_all_reduce(packed, first.group).unbind(1)
        experts = chosen_MEE.shape[-1]
        is_same_EE = torch.eye(experts, dtype=torch.bool, device=packed.device)
        same_MEE, other_MEE = chosen_MEE.where(is_same_EE, 0.0), chosen_MEE.where(~is_same_EE, 0.0)
        # Sums are whole numbers; where one is 0, so are its parts.
        weight_MEE = experts * same_MEE / same_MEE.sum((1, 2), keepdim=True).clamp(min=1)
        pairs = experts**2 - experts
        weight_MEE = weight_MEE + pairs * other_MEE / other_MEE.sum((1, 2), keepdim=True).clamp(min=1)
        return first.weight * (weight_MEE.detach() * probability_MEE).sum((1, 2))


class RaceRouter(Router):
    """Expert Race: in training the T·K best of the T·E pairs of a batch are chosen, T tokens of all ranks.

    A token may have any number of experts, and none, and an expert any number of tokens. The batch is that of
    `model.batch_scope`. The running threshold τ follows the smallest chosen score, τ ← decay·τ + (1 - decay)·score
    (`model.threshold_decay`). At inference all pairs with a score above τ are chosen, so that an image does not depend
    on others.

    Stated by the paper: the race over all pairs (figure 3: K = B·L·k of one group of B·L·E), the logits themselves as
    scores and as routing weights ("identity" gating, which was better than softmax and sigmoid; here
    `model.score_function`), the threshold as an exponential moving average, the router similarity loss.

    Inferred from a reimplementation in public training code of DiffMoE: the router is an MLP, D to D with a GELU, then
    to E, with biases, Xavier-uniform; the decay 0.95; the weight 1e-4 of the similarity loss. That code starts the
    threshold at 1, this one at 0.

    The paper's per-layer regularisation, by which each layer predicts the target of the whole model from the hidden
    units of its router, is not implemented.
    """

    rules = {
        "projection": ParameterRule(xavier_uniform),
        "projection_bias": ParameterRule(zeros),
        "gate": ParameterRule(xavier_uniform),
        "gate_bias": ParameterRule(zeros),
        "threshold": ParameterRule(zeros),
    }
    threshold: Tensor
    data_group: Group = SINGLE_RANK

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.num_experts
        self.projection, self.projection_bias = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(D))
        self.gate, self.gate_bias = nn.Parameter(torch.empty(E, D)), nn.Parameter(torch.empty(E))
        self.register_buffer("threshold", torch.zeros(1))
        self.reset_parameters()

    def set_mesh(self, mesh: Mesh) -> None:
        super().set_mesh(mesh)
        self.data_group = mesh.dp

    def logits(self, x: Tensor) -> Tensor:
        """The logits (..., E) of tokens (..., D), float32."""
        parameters = self.projection, self.projection_bias, self.gate, self.gate_bias
        projection_DD, projection_D, gate_ED, gate_E = map(router_precision, parameters)
        hidden = F.gelu(F.linear(router_precision(x), projection_DD, projection_D))
        return F.linear(hidden, gate_ED, gate_E)

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        logit_TE = self.logits(x_BSD).flatten(0, 1)
        score_TE = self.routing_weights(logit_TE)
        if not self.training:
            return self.output(mask_choice(score_TE > self.threshold, score_TE), {})
        is_chosen_TE = routing_cache.get_or_compute("chosen", lambda: self.race(score_TE.detach()))
        joint_losses: dict[str, JointLoss] = {}
        if self.config.router_similarity_weight:
            p_TE, m_TE = logit_TE.softmax(-1), is_chosen_TE.to(logit_TE.dtype)
            group, weight = self.statistics_group, self.config.router_similarity_weight
            probability_EE = p_TE.T @ p_TE / max(logit_TE.shape[0] * group.size, 1)
            joint_losses["similarity"] = SimilarityInputs(probability_EE, m_TE.T @ m_TE, weight, group)
        return self.output(mask_choice(is_chosen_TE, score_TE), {}, joint_losses=joint_losses)

    def race(self, score_TE: Tensor) -> Tensor:
        """Mask (T, E) of this rank's pairs among the best of the statistics group; updates the threshold. Collective.

        Ties go to the first.
        """
        group = self.statistics_group
        group_TE = gather_tokens(score_TE, group)
        is_chosen_TE, smallest_1 = best_pairs(group_TE, group_TE.shape[0] * self.config.top_k)
        if group_TE.shape[0]:
            self.update_threshold(smallest_1)
        return tokens_of_rank(is_chosen_TE, group)

    def update_threshold(self, smallest_1: Tensor) -> None:
        """Moves the threshold towards the smallest chosen score, its mean over data ranks that have their own race."""
        if self.data_group.size > self.statistics_group.size:
            dist.all_reduce(smallest_1, group=self.data_group.process_group)
            smallest_1 = smallest_1 / self.data_group.size
        decay = self.config.threshold_decay
        self.threshold.mul_(decay).add_(smallest_1, alpha=1 - decay)
