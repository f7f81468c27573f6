"""The router of DiffMoE: experts choose among the tokens of the whole batch, as many as a capacity predictor expects.

Source: DiffMoE, arXiv 2503.14487.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.logical_module import Normal, ParameterRule, zeros
from megapromoe.nn.moe.assignment import mask_choice, top_counts
from megapromoe.nn.moe.batch_choice import best_of_each_expert, gather_tokens, tokens_of_rank
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.routers import LinearRouter, RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.tensor_parallel import Linear


class DiffMoERouter(LinearRouter):
    """DiffMoE: in training each expert takes its int(B·S/E·K) best tokens of the whole batch.

    At inference, expert e takes as many of its best tokens as a capacity predictor expects: the number of tokens whose
    predicted probability exceeds a threshold, which is a running mean from training.
    """

    rules = {"gate": ParameterRule(Normal(0.006)), "threshold": ParameterRule(zeros)}
    threshold: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.num_experts
        self.predictor = nn.Sequential(Linear(D, D), nn.SiLU(), Linear(D, E))
        self.register_buffer("threshold", torch.zeros(E))

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        score_TE = self.scores(x_BSD).flatten(0, 1)
        predicted_TE = router_precision(self.predictor(x_BSD.detach().flatten(0, 1)))
        if not self.training:
            is_chosen_TE = top_counts(score_TE, (predicted_TE.sigmoid() > self.threshold).sum(0))
            return self.output(mask_choice(is_chosen_TE, score_TE), {})
        group_tokens = score_TE.shape[0] * self.statistics_group.size
        count = self.config.tokens_per_expert(group_tokens)
        is_chosen_TE = routing_cache.get_or_compute("chosen", lambda: self.best_of_group(score_TE.detach(), count))
        routing_cache.run_once("thresholds", lambda: self.update_thresholds(predicted_TE.detach().sigmoid()))
        loss = F.binary_cross_entropy_with_logits(predicted_TE, is_chosen_TE.to(predicted_TE.dtype))
        losses = {"capacity": self.config.capacity_predictor_weight * loss}
        return self.output(mask_choice(is_chosen_TE, score_TE), losses)

    def best_of_group(self, score_TE: Tensor, count: int) -> Tensor:
        """Mask (T, E) of this rank's tokens among the `count` best of the statistics group for each expert. Collective.

        Ties go to the first.
        """
        group = self.statistics_group
        return tokens_of_rank(best_of_each_expert(gather_tokens(score_TE, group), count), group)

    def update_thresholds(self, predicted_TE: Tensor) -> None:
        """Moves each threshold towards the n-th largest prediction, n = `tokens_per_expert`. Collective.

        Averaged over the ranks of the statistics group; the decay is `model.threshold_decay`.
        """
        nth_E = predicted_TE.topk(self.config.tokens_per_expert(predicted_TE.shape[0]), dim=0).values[-1]
        if self.statistics_group.size > 1:
            dist.all_reduce(nth_E, group=self.statistics_group.process_group)
        decay = self.config.threshold_decay
        self.threshold.mul_(decay).add_(nth_E / self.statistics_group.size, alpha=1 - decay)
