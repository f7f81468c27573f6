"""A router of one's own: experts are balanced by a bias instead of a loss.

    megapromoe train --preset digits --run-dir runs/first model.router=examples/my_router.py:BiasedRouter

A token goes to the K experts with the largest sigmoid score plus bias; its routing weights are the scores alone. After
each batch the bias of an expert rises if it got fewer tokens than an even share, and falls if it got more. A small loss
keeps the logits near zero.

Source: "Auxiliary-loss-free load balancing", arXiv 2408.15664; the loss is the z-loss of ST-MoE, arXiv 2202.08906.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn import Normal, ParameterRule, Router, RouterOutput, RoutingCache, token_choice, top_k, zeros

BIAS_STEP = 0.01
Z_LOSS_WEIGHT = 0.001


class BiasedRouter(Router):
    """Sigmoid scores of a linear layer, and a bias of each expert that is state and not a parameter."""

    # How each parameter and buffer starts. Parameters are trained; buffers are saved with the model.
    rules = {"gate": ParameterRule(Normal(0.02)), "bias": ParameterRule(zeros)}
    bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.empty(config.num_experts))
        self.reset_parameters()

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        cache = routing_cache or RoutingCache()
        logit_BSE = nn.functional.linear(x_BSD.float(), self.gate.float())
        score_BSE = logit_BSE.sigmoid()
        # The cache returns the choice of the first pass if activations are recomputed, and updates the state once.
        chosen_BSK = cache.get_or_compute("chosen", lambda: top_k(score_BSE.detach() + self.bias, self.config.top_k))
        losses = {}
        if self.training:
            cache.run_once("bias", lambda: self.update_bias(chosen_BSK, cache))
            z_B = logit_BSE.logsumexp(-1).square().mean(1)
            losses["z"] = Z_LOSS_WEIGHT * self.mean_over_images("z", z_B, cache)
        return self.output(token_choice(chosen_BSK, score_BSE.gather(-1, chosen_BSK)), losses)

    def update_bias(self, chosen_BSK: Tensor, cache: RoutingCache) -> None:
        """Moves each bias by one step towards an even load over all ranks of the batch. Collective."""
        ones = torch.ones_like(chosen_BSK, dtype=torch.float32).flatten()
        count_E = torch.zeros_like(self.bias).scatter_add_(0, chosen_BSK.flatten(), ones)
        count_E = self.sum_over_group("load", count_E, cache)
        self.bias.add_((count_E.mean() - count_E).sign(), alpha=BIAS_STEP)
