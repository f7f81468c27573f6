"""A router that is a Gaussian mixture: a token goes to the experts with the largest posterior probability.

Stated by the paper (ProMoE, arXiv 2510.24711 v2, appendix C.8, table 15): a "GMM-based routing baseline" of the large
model with 12 routed, 1 shared and 1 unconditional expert, of which a token uses 1 or 3 routed ones; 458 M or 558 M
active and 1.063 B parameters; FID-50K 15.56 or 15.44 at guidance 1.0, and 3.76 or 3.72 at 1.5. It relies on "purely
implicit learning", like other clustering, without the contrastive loss.

Inferred, because the paper gives no formula: everything below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.logical_module import Normal, ParameterRule, zeros
from megapromoe.nn.moe.assignment import token_choice, top_k
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.routers import Router, RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache


class MixtureRouter(Router):
    """ProMoE's two-step router with a Gaussian mixture in place of prototypes.

    The mixture of a layer has one component for each expert e: a mean μ_e (D), variances σ²_e (D, or one with
    `model.mixture_variance=isotropic`) and a mixing weight π_e. All are parameters; variances and mixing weights are
    stored as logarithms, of which the latter are normalised by a softmax. With the joint density of token and component

        log p(x, e) = log π_e - 1/2 Σ_d [(x_d - μ_ed)² / σ²_ed + log σ²_ed + log 2π]

    a token goes to the K components with the largest posterior p(e | x) = softmax_e log p(x, e), which is the routing
    weight; it is not renormalised over the K. The posterior has gradients.

    In training the mixture is also fitted to the tokens of the batch, by the mean negative log-likelihood per channel
    (`model.mixture_weight`),

        -1/D · mean_x log Σ_e p(x, e).

    Its gradient reaches the parameters of the mixture and not the tokens: a representation that may move could make its
    own likelihood arbitrarily large.

    Initial values: means as prototypes, N(0, 0.02), variances 1 as those of normalised tokens, equal mixing weights.
    """

    rules = {
        "means": ParameterRule(Normal(0.02)),
        "log_variances": ParameterRule(zeros),
        "log_mixing": ParameterRule(zeros),
    }

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.num_experts
        self.means = nn.Parameter(torch.empty(E, D))
        self.log_variances = nn.Parameter(torch.empty(E, D if config.mixture_variance == "diagonal" else 1))
        self.log_mixing = nn.Parameter(torch.empty(E))
        self.reset_parameters()

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        x_BSD = router_precision(x_BSD)
        square = self._square(x_BSD)
        log_joint_BSE = self._log_joint(x_BSD, square)
        # Of the logarithms: posteriors of far components are equal, zero.
        chosen_BSK = routing_cache.get_or_compute("chosen", lambda: top_k(log_joint_BSE.detach(), self.config.top_k))
        posterior_BSE = log_joint_BSE.softmax(-1)
        losses = {}
        if self.training and self.config.mixture_weight:
            # By the largest term, as torch's logsumexp, which cannot be compiled for an unknown number of images.
            largest_BS1 = log_joint_BSE.detach().gather(-1, chosen_BSK[..., :1])
            fit_BSE = self._log_joint(x_BSD.detach(), square.detach()) - largest_BS1
            fit_BS = fit_BSE.exp().sum(-1).log() + largest_BS1[..., 0]
            loss_B = -fit_BS.mean(1) / self.config.hidden_size
            losses["mixture"] = self.config.mixture_weight * self.mean_over_images("mixture", loss_B, routing_cache)
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance_loss(posterior_BSE, chosen_BSK, routing_cache)
        return self.output(token_choice(chosen_BSK, posterior_BSE.gather(-1, chosen_BSK)), losses)

    def _square(self, x_BSD: Tensor) -> Tensor:
        """x² of each channel (B, S, D), or with isotropic variances its sum (B, S, 1)."""
        if self.config.mixture_variance == "diagonal":
            return x_BSD.square()
        return x_BSD.square().sum(-1, keepdim=True)

    def _log_joint(self, x_BSD: Tensor, square: Tensor) -> Tensor:
        """log p(x, e), (B, S, E), from the tokens and `_square` of them: two products of tokens and experts.

        Source: (x - μ)² / σ² = x² / σ² - 2 x μ / σ² + μ² / σ².
        """
        D, log_variances = self.config.hidden_size, router_precision(self.log_variances)
        means_ED, inverse = router_precision(self.means), torch.exp(-log_variances)
        scaled_ED = means_ED * inverse
        log_determinant_E = log_variances.sum(-1) * (D // log_variances.shape[1])
        constant_E = (means_ED * scaled_ED).sum(-1) + log_determinant_E + D * math.log(2 * math.pi)
        bias_E = router_precision(self.log_mixing).log_softmax(-1) - 0.5 * constant_E
        return F.linear(x_BSD, scaled_ED, bias_E) - 0.5 * F.linear(square, inverse)
