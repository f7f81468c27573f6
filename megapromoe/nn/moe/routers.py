"""Routers: which token visits which expert, with which weight. Those guided by classes or k-means: `guided_routers.py`.

Every router takes tokens x (B, S, D) and labels y (B), which only the guidance by classes looks at, and returns
`Routed`: a route (rows over the B·S tokens), its losses, already weighted, and the load of each expert. Scores are
computed in float32. B may be 0: all results are then empty, every loss is 0, and the parameters stay in the graph.

Statistics of a batch (centroids, balance, DiffMoE's choice) are those of the global micro-batch if `scope` is the
data-parallel group (`model.batch_scope=global`), of this rank's images if it is a group of one (`rank`).

A router may be asked twice about one batch, with the same `Decisions`: it then chooses, communicates and moves its
state only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.options import ModelConfig
from megapromoe.distributed.collectives import sum_over
from megapromoe.distributed.mesh import SINGLE_RANK, Group
from megapromoe.nn.moe.dispatcher import Route, counts
from megapromoe.nn.moe.prototypes import Choose, Contrast, contrastive_loss, contrastive_losses, resemblance
from megapromoe.nn.moe.routing_cache import Decisions


class Routed(NamedTuple):
    """`route`; `losses` name -> scalar, weighted; `load_E` rows per expert, float32; `gate` mean weight, scalar.

    `contrast`: of a loss that is computed for all layers together, by `Router.losses_of`.
    """

    route: Route
    losses: dict[str, Tensor]
    load_E: Tensor
    gate: Tensor
    contrast: Contrast | None = None


class Router(nn.Module):
    """What routers have in common."""

    scope: Group = SINGLE_RANK

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.experts = config.num_experts

    def losses_of(self, all_routed: Sequence[Routed]) -> dict[str, Tensor]:
        """The weighted losses (L,) of several layers, from what their routers said; all of this kind. Collective."""
        return {name: torch.stack([routed.losses[name] for routed in all_routed]) for name in all_routed[0].losses}

    def result(
        self,
        route: Route,
        losses: dict[str, Tensor],
        load_E: Tensor | None = None,
        contrast: Contrast | None = None,
    ) -> Routed:
        with torch.no_grad():
            load_E = counts(route.expert_R, self.experts).float() if load_E is None else load_E
            gate = route.weight_R.sum(dtype=torch.float32) / max(route.weight_R.shape[0], 1)
        return Routed(route, losses, load_E, gate, contrast)

    def gates(self, score: Tensor, competitors: int = -1) -> Tensor:
        """Weights from scores, of the same shape; never renormalised over the chosen ones.

        `competitors`: the dimension that a softmax gate adds up to one over. What competes is what is chosen from:
        experts under token choice, the image's tokens under expert choice.
        """
        if self.config.gate == "identity":
            return score
        return score.sigmoid() if self.config.gate == "sigmoid" else score.softmax(competitors)

    def probabilities(self, weight: Tensor) -> Tensor:
        """Each token's distribution over experts for the balance loss, from its weights (..., E) of all experts.

        Those of a softmax gate are one; those of another gate pass through a softmax. Source: the ProMoE release.
        """
        return weight if self.config.gate == "softmax" else weight.softmax(-1)

    def balance(self, p_BSE: Tensor, chosen_BSK: Tensor, decided: Decisions) -> Tensor:
        """α·Σ_e P_e·f_e over the batch, or per image and averaged; f_e = E · fraction of assignments, P_e the mean of
        the probabilities `p_BSE`."""
        one = torch.ones_like(chosen_BSK, dtype=torch.float32)
        hits_BSE = torch.zeros_like(p_BSE).scatter_add_(-1, chosen_BSK, one)
        if self.config.balance_form == "batch":
            hits_E, p_E = hits_BSE.sum((0, 1)), p_BSE.sum((0, 1))
            tokens = p_E.new_tensor(float(p_BSE.shape[0] * p_BSE.shape[1]))
            said = torch.cat([hits_E, p_E, tokens[None]])
            packed = decided.once("balance", lambda: sum_over(said, self.scope))
            hits_E, p_E, tokens = packed[: self.experts], packed[self.experts : -1], packed[-1].clamp(min=1)
            f_E = self.experts * hits_E / (tokens * self.config.top_k)
            return self.config.balance_weight * (f_E.detach() * p_E / tokens).sum()
        f_BE = self.experts * hits_BSE.mean(1) / self.config.top_k
        return self.config.balance_weight * self.mean_over_images("balance", (f_BE * p_BSE.mean(1)).sum(-1), decided)

    def mean_over_images(self, name: str, value_B: Tensor, decided: Decisions) -> Tensor:
        """Mean over the images of the scope; 0 without any."""
        packed = torch.stack([value_B.sum(), value_B.new_tensor(float(value_B.shape[0]))])
        total, images = decided.once(name, lambda: sum_over(packed, self.scope))
        return total / images.clamp(min=1)


class PrototypeRouter(Router):
    """ProMoE: a token goes to the experts whose prototypes it resembles most (cosine).

    Source: ProMoE, arXiv 2510.24711, "Prototypical routing" and "Routing contrastive learning".
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.prototypes = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def similarity(self, x: Tensor, choose: Choose | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`prototypes.resemblance` with this layer's prototypes."""
        return resemblance(x, self.prototypes, choose)

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        K = self.config.top_k
        counted = K if self.config.rcl_tokens == "all" else 1
        contrasts = self.training and self.config.rcl_weight

        def choose(score_BSE: Tensor) -> Tensor:
            return decided.once("chosen", lambda: best(score_BSE.detach(), K))

        def counted_ones(score_BSE: Tensor) -> Tensor:
            return choose(score_BSE)[..., :counted]

        score_BSE, sum_ED, count_E = self.similarity(x_BSD, counted_ones if contrasts else None)
        chosen_BSK = choose(score_BSE)
        weight_BSE = self.gates(score_BSE)
        route = rows_of_tokens(chosen_BSK, weight_BSE.gather(-1, chosen_BSK))
        contrast = None
        if sum_ED is not None and count_E is not None:
            contrast = Contrast(self.prototypes.double(), sum_ED, count_E)
        losses = {}
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance(self.probabilities(weight_BSE), chosen_BSK, decided)
        return self.result(route, losses, count_E if counted == K else None, contrast)

    def losses_of(self, all_routed: Sequence[Routed]) -> dict[str, Tensor]:
        losses = super().losses_of(all_routed)
        contrasts = [routed.contrast for routed in all_routed if routed.contrast is not None]
        if contrasts:
            loss_L = contrastive_losses(contrasts, self.config.rcl_temperature, self.scope)
            losses["rcl"] = self.config.rcl_weight * loss_L
        return losses


class PrototypeExpertChoiceRouter(PrototypeRouter):
    """ProMoE with expert choice: of each image every expert takes the int(S/E·K) tokens (at least one) most like it.

    The contrastive loss is per image, averaged over images; a softmax gate is over the image's tokens.
    Source: ProMoE, arXiv 2510.24711, expert-choice variant.
    """

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        B, S, D = x_BSD.shape
        score_BSE, _, _ = self.similarity(x_BSD)
        score_BES = score_BSE.detach().transpose(1, 2)
        chosen_BEC = decided.once("chosen", lambda: score_BES.topk(self.config.tokens_per_expert(S), dim=-1).indices)
        weight_BEC = self.gates(score_BSE, competitors=1).transpose(1, 2).gather(-1, chosen_BEC)
        route = rows_of_choice(chosen_BEC, weight_BEC, S)
        losses = {}
        if self.training and self.config.rcl_weight:
            C = chosen_BEC.shape[-1]
            taken_BRD = x_BSD.float().gather(1, chosen_BEC.flatten(1).unsqueeze(-1).expand(-1, -1, D))
            sum_BED = taken_BRD.view(B, self.experts, C, D).sum(2)
            count_BE = sum_BED.new_full((B, self.experts), C)
            loss_B = contrastive_loss(self.prototypes, sum_BED, count_BE, self.config.rcl_temperature)
            losses["rcl"] = self.config.rcl_weight * self.mean_over_images("rcl", loss_B, decided)
        return self.result(route, losses)


class GateRouter(Router):
    """Softmax over a linear gate, a token takes its top-K experts, weights not renormalised.

    As "tc" this is TC-DiT; as "promoe_linear" ProMoE's two-step router without its prototypes.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def scores(self, x_BSD: Tensor) -> Tensor:
        """Softmax scores (B, S, E), float32."""
        return F.linear(x_BSD.float(), self.gate.float()).softmax(-1)

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        score_BSE = self.scores(x_BSD)
        chosen_BSK = decided.once("chosen", lambda: best(score_BSE.detach(), self.config.top_k))
        route = rows_of_tokens(chosen_BSK, score_BSE.gather(-1, chosen_BSK))
        losses = {}
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance(score_BSE, chosen_BSK, decided)
        return self.result(route, losses)


class ExpertChoiceRouter(GateRouter):
    """EC-DiT: of each image every expert takes its int(S/E·K) best tokens. Source: arXiv 2410.02098."""

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        score_BES = self.scores(x_BSD).transpose(1, 2)
        capacity = self.config.tokens_per_expert(x_BSD.shape[1])
        chosen_BEC = decided.once("chosen", lambda: score_BES.detach().topk(capacity, dim=-1).indices)
        weight_BEC = score_BES.gather(-1, chosen_BEC)
        return self.result(rows_of_choice(chosen_BEC, weight_BEC, x_BSD.shape[1]), {})


class DiffMoERouter(GateRouter):
    """DiffMoE: every expert takes its int(B·S/E·K) best tokens of the whole batch.

    At inference, expert e takes as many as a predictor, trained on the side, expects: those whose predicted sigmoid
    exceeds a threshold that followed the training. Source: DiffMoE, arXiv 2503.14487.
    """

    threshold: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.num_experts
        self.predictor = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, E))
        self.register_buffer("threshold", torch.zeros(E))

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        score_TE = self.scores(x_BSD).flatten(0, 1)
        predicted_TE = self.predictor(x_BSD.detach().flatten(0, 1)).float()
        if not self.training:
            taken_TE = top_counts(score_TE, (predicted_TE.sigmoid() > self.threshold).sum(0))
            return self.result(rows_of_mask(taken_TE, score_TE), {})
        tokens = score_TE.shape[0] * self.scope.size
        taken_TE = decided.once(
            "taken", lambda: self.best_of_scope(score_TE.detach(), self.config.tokens_per_expert(tokens))
        )
        decided.run_once("followed", lambda: self.follow(predicted_TE.detach().sigmoid()))
        loss = F.binary_cross_entropy_with_logits(predicted_TE, taken_TE.float())
        losses = {"capacity": self.config.capacity_weight * loss}
        return self.result(rows_of_mask(taken_TE, score_TE), losses)

    def best_of_scope(self, score_TE: Tensor, count: int) -> Tensor:
        """Mask (T, E): is the token among the `count` best of the scope for the expert? Ties go to the first."""
        parts = [score_TE]
        if self.scope.size > 1:
            parts = [torch.empty_like(score_TE) for _ in range(self.scope.size)]
            dist.all_gather(parts, score_TE.contiguous(), group=self.scope.handle)
        all_TE = torch.cat(parts)
        taken_TE = torch.zeros_like(all_TE, dtype=torch.bool)
        taken_TE.scatter_(0, all_TE.topk(count, dim=0).indices, True)
        T = score_TE.shape[0]
        return taken_TE[T * self.scope.rank : T * (self.scope.rank + 1)] if self.scope.size > 1 else taken_TE

    def follow(self, predicted_TE: Tensor) -> None:
        """Moves each threshold towards the capacity-th largest prediction, averaged over the scope's ranks."""
        kth_E = predicted_TE.topk(self.config.tokens_per_expert(predicted_TE.shape[0]), dim=0).values[-1]
        if self.scope.size > 1:
            dist.all_reduce(kth_E, group=self.scope.handle)
        decay = self.config.capacity_decay
        self.threshold.mul_(decay).add_(kth_E / self.scope.size, alpha=1 - decay)


ROUTERS: dict[str, type[Router]] = {
    "promoe": PrototypeRouter,
    "promoe_ec": PrototypeExpertChoiceRouter,
    "promoe_linear": GateRouter,
    "tc": GateRouter,
    "ec": ExpertChoiceRouter,
    "diffmoe": DiffMoERouter,
}


def best(score: Tensor, K: int) -> Tensor:
    """The indices (..., K) of the largest scores (..., E)."""
    return score.argmax(-1, keepdim=True) if K == 1 else score.topk(K, dim=-1).indices


def rows_of_tokens(chosen: Tensor, weight: Tensor) -> Route:
    """Rows where each token chose K experts: indices and weights (..., K)."""
    K = chosen.shape[-1]
    token_T = torch.arange(chosen.shape[:-1].numel(), device=chosen.device)
    token_R = token_T if K == 1 else token_T.repeat_interleave(K)
    return Route(token_R, chosen.flatten(), weight.flatten(), top_k=K)


def rows_of_choice(chosen_BEC: Tensor, weight_BEC: Tensor, S: int) -> Route:
    """Rows where each expert chose C tokens of each image: indices (B, E, C) within the image."""
    B, E, C = chosen_BEC.shape
    first_B = torch.arange(B, device=chosen_BEC.device) * S
    expert_E = torch.arange(E, device=chosen_BEC.device)
    token_R = (chosen_BEC + first_B[:, None, None]).flatten()
    return Route(token_R, expert_E[None, :, None].expand(B, E, C).flatten(), weight_BEC.flatten())


def rows_of_mask(taken_TE: Tensor, score_TE: Tensor) -> Route:
    """Rows where the mask (T, E) is set; weights are the scores."""
    token_R, expert_R = taken_TE.nonzero(as_tuple=True)
    return Route(token_R, expert_R, score_TE[token_R, expert_R])


def top_counts(score_TE: Tensor, count_E: Tensor) -> Tensor:
    """Mask (T, E) of each expert's count_E[e] highest-scoring tokens."""
    order_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    place = torch.arange(score_TE.shape[0], device=score_TE.device)[:, None].expand_as(order_TE)
    rank_TE = torch.empty_like(order_TE).scatter_(0, order_TE, place)
    return rank_TE < count_E[None]
