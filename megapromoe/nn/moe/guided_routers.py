"""Routers with semantic guidance: by the classes of the images, and by k-means over their tokens.

The alternatives to the contrastive loss that the paper compares. As there, each token visits one expert, nothing
balances the load, and the shared and the unconditional expert stand beside the routed ones.

Source: ProMoE, arXiv 2510.24711, section 4.2 "Semantic routing guidance".
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.options import ModelConfig
from megapromoe.distributed.collectives import sum_over
from megapromoe.nn.moe.routers import Routed, Router, rows_of_tokens
from megapromoe.nn.moe.routing_cache import Decisions

NO_SUPERCLASS = -1  # of the null class
STARVED = 0.01  # of an even share of the tokens: below it a centroid is moved
NOT_A_TOKEN = 2.0  # more than any cosine


class ClassificationRouter(Router):
    """Explicit guidance: a classifier reads an image's super-class off its mean token; all tokens go to its expert.

    There is one expert for each super-class (`model.superclasses`). In training the classifier learns from the labels
    by cross-entropy; routing, then as in sampling, goes by what it reads.

    The paper leaves open: the classifier, here linear with a bias; the weight of the chosen expert, here its softmax
    probability, as in TC, so that the denoising loss teaches the classifier too; the weight of the loss, here 1.
    """

    superclass_C: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_experts)
        table_C = torch.empty(config.num_classes + 1, dtype=torch.int64)
        self.register_buffer("superclass_C", table_C, persistent=False)

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        S = x_BSD.shape[1]
        mean_BD = x_BSD.float().mean(1)
        logit_BE = F.linear(mean_BD, self.classifier.weight.float(), self.classifier.bias.float())
        p_BE = logit_BE.softmax(-1)
        chosen_B = decided.once("chosen", lambda: p_BE.argmax(-1))
        weight_B = p_BE.gather(-1, chosen_B[:, None])[:, 0]
        route = rows_of_tokens(chosen_B.repeat_interleave(S)[:, None], weight_B.repeat_interleave(S)[:, None])
        losses = {}
        if self.training and self.config.classification_weight:
            if y_B is None:
                raise ValueError("the classification router learns from labels: call it with y_B in training")
            losses["classification"] = self.config.classification_weight * self.cross_entropy(logit_BE, y_B, decided)
        if self.training and self.config.balance_weight:
            losses["balance"] = self.balance(p_BE[:, None], chosen_B[:, None, None], decided)
        return self.result(route, losses)

    def cross_entropy(self, logit_BE: Tensor, y_B: Tensor, decided: Decisions) -> Tensor:
        """Mean over the labelled images of the scope; 0 without any."""
        target_B = self.superclass_C[y_B]
        known_B = target_B != NO_SUPERCLASS
        loss_B = F.cross_entropy(logit_BE, target_B, ignore_index=NO_SUPERCLASS, reduction="none")
        said = torch.stack([loss_B.sum(), known_B.sum().float()])
        total, images = decided.once("cross-entropy", lambda: sum_over(said, self.scope))
        return total / images.clamp(min=1)


class KMeansRouter(Router):
    """Implicit guidance: a token goes to the centroid it resembles most (cosine); centroids follow their tokens.

    This is k-means on the sphere. In training, after a batch is routed, each centroid c moves towards the mean of its
    tokens' directions, c ← decay·c + (1 - decay)·mean, over all data ranks. No gradient flows to centroids. The
    weight of an expert follows from the cosine by `model.gate`, as in ProMoE.

    Centroids are state of the model, the same on every rank: saved with it, not averaged by the EMA, moved once for
    each micro-batch (also where activations are made again), and left alone by one whose tokens are not finite.

    Where it departs from the paper, which starts with random tokens, replaces centroids by the means of the batch
    (`model.kmeans_decay=0`) and does not say which distance it takes or what becomes of empty clusters: centroids
    start in random directions from `train.seed`; one whose running share of the tokens fell below 1 % of an even one
    is moved onto the token that resembles its own centroid least, as scikit-learn does with empty clusters, and has
    an even share to lose again. One centroid of a layer is moved in a batch: then no size comes to the host.
    """

    centroids: Tensor
    share: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.register_buffer("centroids", torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("share", torch.empty(config.num_experts))

    def forward(self, x_BSD: Tensor, y_B: Tensor | None = None, decided: Decisions | None = None) -> Routed:
        decided = decided or Decisions()
        unit_TD = F.normalize(x_BSD.float(), dim=-1).flatten(0, 1)
        # As they are before they move: a second pass needs the scores of the first.
        centroids_ED = decided.once("centroids", lambda: F.normalize(self.centroids, dim=-1))
        score_TE = unit_TD @ centroids_ED.T
        chosen_T = decided.once("chosen", lambda: score_TE.argmax(-1))
        weight_T = self.gates(score_TE).gather(1, chosen_T[:, None])[:, 0]
        if self.training:
            nearest_T = score_TE.detach().gather(1, chosen_T[:, None])[:, 0]
            decided.run_once("followed", lambda: self.follow(unit_TD.detach(), nearest_T, chosen_T))
        return self.result(rows_of_tokens(chosen_T[:, None], weight_T[:, None]), {})

    def follow(self, unit_TD: Tensor, nearest_T: Tensor, chosen_T: Tensor) -> None:
        """Moves the centroids. Collective over the scope.

        Args:
            unit_TD: the tokens' directions.
            nearest_T: their cosines with their centroids.
            chosen_T: whose they are.
        """
        decay = self.config.kmeans_decay
        # A product, for adding by index is not reproducible on GPUs, and tp ranks must end up with the same centroids.
        mine_ET = (torch.arange(self.experts, device=chosen_T.device)[:, None] == chosen_T).to(unit_TD)
        packed = sum_over(torch.cat([mine_ET @ unit_TD, mine_ET.sum(1, keepdim=True)], dim=1), self.scope)
        sum_ED, count_E = packed[:, :-1], packed[:, -1]
        mean_ED = sum_ED / count_E.clamp(min=1)[:, None]
        usable_E = (count_E > 0) & mean_ED.isfinite().all(-1)
        centroid_ED = torch.where(usable_E[:, None], decay * self.centroids + (1 - decay) * mean_ED, self.centroids)
        tokens = count_E.sum()
        share_E = torch.where(tokens > 0, decay * self.share + (1 - decay) * count_E / tokens.clamp(min=1), self.share)

        cosine, stray_D = self.stray(unit_TD, nearest_T)
        starved_E = share_E * self.experts < STARVED
        moved_E = starved_E & (starved_E.cumsum(0) == 1) & (cosine < NOT_A_TOKEN)
        self.centroids.copy_(torch.where(moved_E[:, None], stray_D, centroid_ED))
        self.share.copy_(torch.where(moved_E, 1 / self.experts, share_E))

    def stray(self, unit_TD: Tensor, nearest_T: Tensor) -> tuple[Tensor, Tensor]:
        """The token of the scope that resembles its centroid least, and how much; cosine 2 if there is no token."""
        none_1D = torch.cat([unit_TD.new_full((1, 1), NOT_A_TOKEN), unit_TD.new_zeros(1, unit_TD.shape[1])], dim=1)
        cosine_T = torch.cat([none_1D[:, 0], nearest_T.nan_to_num(NOT_A_TOKEN)])
        # Selected, not indexed: a number as an index would come to the host first.
        place = cosine_T.argmin(0, keepdim=True)
        best_1D = torch.cat([none_1D[:, 1:], unit_TD]).index_select(0, place)
        best = torch.cat([cosine_T.index_select(0, place), best_1D[0]])
        if self.scope.size > 1:
            parts = [torch.empty_like(best) for _ in range(self.scope.size)]
            dist.all_gather(parts, best.contiguous(), group=self.scope.handle)
            found = torch.stack(parts)
            best = found.index_select(0, found[:, 0].argmin(0, keepdim=True))[0]
        return best[0], best[1:]


GUIDED: dict[str, type[Router]] = {"classification": ClassificationRouter, "kmeans": KMeansRouter}
