"""Routers with semantic guidance: by the class of an image, and by k-means over tokens.

The paper compares both with the contrastive loss. As in the paper, each token has one expert, no loss balances the
load, and a shared and an unconditional expert complete the routed ones.

Source: ProMoE, arXiv 2510.24711, section 4.2 "Semantic routing guidance".
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.collectives import differentiable_all_reduce
from megapromoe.nn.logical_module import ParameterRule, even_shares, random_directions
from megapromoe.nn.moe.assignment import token_choice
from megapromoe.nn.moe.prototypes import router_precision
from megapromoe.nn.moe.routers import Router, RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.tensor_parallel import Linear

NO_SUPERCLASS = -1  # super-class of the null class
DEAD_EXPERT_SHARE = 0.01  # a centroid is moved if its share of the tokens is below this part of an even share
NO_TOKEN_COSINE = 2.0  # larger than any cosine: there is no token


class ClassificationRouter(Router):
    """Explicit guidance: all tokens of an image go to the expert of its super-class, which a classifier predicts.

    There is one expert for each super-class (`model.superclasses`). Its input is the mean token of the image. In
    training it learns from the labels by cross-entropy; routing always uses its prediction, never the label.

    The paper does not define three details: the classifier, here linear with a bias; the routing weight, here the
    softmax probability of the chosen expert as in TC, so that the denoising loss trains the classifier too; and the
    weight of the loss, here 1.
    """

    superclass_of_class: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.classifier = Linear(config.hidden_size, config.num_experts)
        table = torch.empty(config.num_classes + 1, dtype=torch.int64)
        self.register_buffer("superclass_of_class", table, persistent=False)
        self.reset_parameters()

    def initialize(self, name: str, value: Tensor, generator: torch.Generator | None = None) -> None:
        if name == "superclass_of_class":
            value.copy_(torch.tensor([*self.config.superclass_of, NO_SUPERCLASS]))
        else:
            super().initialize(name, value, generator)

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        S = x_BSD.shape[1]
        mean_BD = router_precision(x_BSD).mean(1)
        weight_ED, bias_E = router_precision(self.classifier.weight), router_precision(self.classifier.bias)
        logit_BE = F.linear(mean_BD, weight_ED, bias_E)
        p_BE = logit_BE.softmax(-1)
        chosen_B = routing_cache.get_or_compute("chosen", lambda: p_BE.argmax(-1))
        weight_B = p_BE.gather(-1, chosen_B[:, None])[:, 0]
        assignment = token_choice(chosen_B.repeat_interleave(S)[:, None], weight_B.repeat_interleave(S)[:, None])
        losses = {}
        if self.training and self.config.classification_weight:
            if y_B is None:
                raise ValueError("the classification router learns from labels: call it with y_B in training")
            loss = self.cross_entropy(logit_BE, y_B, routing_cache)
            losses["classification"] = self.config.classification_weight * loss
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance_loss(p_BE[:, None], chosen_B[:, None, None], routing_cache)
        return self.output(assignment, losses)

    def cross_entropy(self, logit_BE: Tensor, y_B: Tensor, routing_cache: RoutingCache) -> Tensor:
        """Mean over the images of the statistics group that have a class, scalar; 0 if none has."""
        target_B = self.superclass_of_class[y_B]
        has_class_B = target_B != NO_SUPERCLASS
        loss_B = F.cross_entropy(logit_BE, target_B, ignore_index=NO_SUPERCLASS, reduction="none")
        packed = torch.stack([loss_B.sum(), has_class_B.sum().to(loss_B.dtype)])
        total, images = self.sum_over_group("cross-entropy", packed, routing_cache)
        return total / images.clamp(min=1)


class KMeansRouter(Router):
    """Implicit guidance: a token goes to the centroid with the largest cosine, and centroids are updated by k-means.

    This is k-means on the sphere. In training, after a batch is routed, each centroid c is updated by the mean of the
    directions of its tokens over all data ranks: c ← decay·c + (1 - decay)·mean. Centroids get no gradient. The routing
    weight is computed from the cosine as `model.score_function` says, as in ProMoE.

    Centroids are part of the model's state and equal on all ranks. They are saved with the model, but not averaged by
    the EMA. They are updated once for each micro-batch, also if activations are recomputed, and not at all by a
    micro-batch with tokens that are not finite.

    Differences from the paper. The paper starts with random tokens, replaces centroids by the means of the batch
    (`model.kmeans_decay=0`), and does not define the distance or the treatment of empty clusters. Here centroids start
    with random directions drawn from `train.seed`. A centroid whose running share of the tokens falls below 1 % of an
    even share is moved to the token that has the smallest cosine with its own centroid, as scikit-learn does with empty
    clusters; its share is then reset to an even one. At most one centroid of a layer is moved for a batch, so that no
    size has to be read by the host.
    """

    rules = {"centroids": ParameterRule(random_directions), "share": ParameterRule(even_shares)}
    centroids: Tensor
    share: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.register_buffer("centroids", torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("share", torch.empty(config.num_experts))
        self.reset_parameters()

    def forward(
        self, x_BSD: Tensor, y_B: Tensor | None = None, routing_cache: RoutingCache | None = None
    ) -> RouterOutput:
        routing_cache = routing_cache or RoutingCache()
        unit_TD = F.normalize(router_precision(x_BSD), dim=-1).flatten(0, 1)
        # The centroids before their update: a second pass needs the same scores as the first.
        centroid_ED = routing_cache.get_or_compute("centroids", lambda: F.normalize(self.centroids, dim=-1))
        score_TE = unit_TD @ centroid_ED.T
        chosen_T = routing_cache.get_or_compute("chosen", lambda: score_TE.argmax(-1))
        weight_T = self.routing_weights(score_TE).gather(1, chosen_T[:, None])[:, 0]
        if self.training:
            cosine_T = score_TE.detach().gather(1, chosen_T[:, None])[:, 0]
            routing_cache.run_once("update", lambda: self.update_centroids(unit_TD.detach(), cosine_T, chosen_T))
        return self.output(token_choice(chosen_T[:, None], weight_T[:, None]), {})

    def update_centroids(self, unit_TD: Tensor, cosine_T: Tensor, chosen_T: Tensor) -> None:
        """Updates centroids and their shares of the tokens. Collective over the statistics group.

        Args:
            unit_TD: directions of the tokens.
            cosine_T: cosine of each token with its centroid.
            chosen_T: the centroid of each token, int64.
        """
        decay = self.config.kmeans_decay
        # A product, since index_add is not reproducible on GPUs, and tp ranks must compute the same centroids.
        is_chosen_ET = (torch.arange(self.num_experts, device=chosen_T.device)[:, None] == chosen_T).to(unit_TD)
        packed = torch.cat([is_chosen_ET @ unit_TD, is_chosen_ET.sum(1, keepdim=True)], dim=1)
        packed = differentiable_all_reduce(packed, self.statistics_group)
        sum_ED, count_E = packed[:, :-1], packed[:, -1]
        mean_ED = sum_ED / count_E.clamp(min=1)[:, None]
        usable_E = (count_E > 0) & mean_ED.isfinite().all(-1)
        centroid_ED = torch.where(usable_E[:, None], decay * self.centroids + (1 - decay) * mean_ED, self.centroids)
        tokens = count_E.sum()
        share_E = torch.where(tokens > 0, decay * self.share + (1 - decay) * count_E / tokens.clamp(min=1), self.share)

        farthest_cosine, farthest_D = self.farthest_token(unit_TD, cosine_T)
        dead_E = share_E * self.num_experts < DEAD_EXPERT_SHARE
        moved_E = dead_E & (dead_E.cumsum(0) == 1) & (farthest_cosine < NO_TOKEN_COSINE)
        self.centroids.copy_(torch.where(moved_E[:, None], farthest_D, centroid_ED))
        self.share.copy_(torch.where(moved_E, 1 / self.num_experts, share_E))

    def farthest_token(self, unit_TD: Tensor, cosine_T: Tensor) -> tuple[Tensor, Tensor]:
        """The token of the statistics group with the smallest cosine with its own centroid. Collective.

        Returns:
            the cosine, scalar, `NO_TOKEN_COSINE` if there is no token; and the direction of the token (D,).
        """
        none_1D = torch.cat([unit_TD.new_full((1, 1), NO_TOKEN_COSINE), unit_TD.new_zeros(1, unit_TD.shape[1])], dim=1)
        cosine_T = torch.cat([none_1D[:, 0], cosine_T.nan_to_num(NO_TOKEN_COSINE)])
        # index_select with a tensor: an index that is a number would have to be read by the host.
        index = cosine_T.argmin(0, keepdim=True)
        direction_1D = torch.cat([none_1D[:, 1:], unit_TD]).index_select(0, index)
        packed = torch.cat([cosine_T.index_select(0, index), direction_1D[0]])
        group = self.statistics_group
        if group.size > 1:
            parts = [torch.empty_like(packed) for _ in range(group.size)]
            dist.all_gather(parts, packed.contiguous(), group=group.process_group)
            ranks = torch.stack(parts)
            packed = ranks.index_select(0, ranks[:, 0].argmin(0, keepdim=True))[0]
        return packed[0], packed[1:]
