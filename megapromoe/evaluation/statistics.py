"""Metrics that compare sets of images by their features: streaming, in float64, distributed over ranks.

* Fréchet distance of two normal distributions. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
* Inception score. Source: Salimans et al. 2016 (arXiv 1606.03498).
* Precision and recall of manifolds of nearest neighbours. Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megapromoe.distributed.agreement import all_reduce_sum, this_rank, world_size

SCORE_SPLIT = 5000  # images of one split of the Inception score: 10 splits of the usual 50,000
NEIGHBOURS = 3
_ROWS = 512  # rows of a distance matrix per block; the same for any number of ranks, so the results have the same bits


@dataclass(frozen=True)
class Normal:
    """A normal distribution: mean (D,), covariance (D, D), float64 on the CPU; fitted to `count` vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


class Moments:
    """Mean and covariance of vectors, computed batch by batch in one pass.

    Deviations are summed around the current mean, which avoids cancellation. Source: Chan, Golub and LeVeque 1979.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x_ND: Tensor) -> None:
        """Adds a batch of vectors (N, D)."""
        x_ND = x_ND.double()
        mean = x_ND.mean(0)
        centred = x_ND - mean
        total = self.count + len(x_ND)
        delta = mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * len(x_ND) / total)
        self.mean += delta * (len(x_ND) / total)
        self.count = total

    def normal(self) -> Normal:
        """The distribution of the vectors of all ranks, with unbiased covariance. Collective.

        Raises ValueError for fewer than two vectors.
        """
        count = int(all_reduce_sum(torch.tensor(self.count, device=self.mean.device)))
        if count < 2:
            raise ValueError(f"a covariance needs at least two vectors, not {count}")
        mean = all_reduce_sum(self.mean * self.count) / count
        delta = self.mean - mean
        scatter = all_reduce_sum(self.scatter + torch.outer(delta, delta) * self.count)
        return Normal(mean.cpu(), scatter.cpu() / (count - 1), count)


def frechet_distance(a: Normal, b: Normal) -> float:
    """|mean difference|² + tr(A + B - 2 (A B)^½), float64.

    tr (A B)^½ is computed as the sum of the singular values of A^½ B^½. This is also accurate for nearly singular
    covariances, unlike the matrix square root of the product A B, which is not symmetric.
    """
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b).sum()
    delta = a.mean - b.mean
    distance = delta @ delta + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can make 0 slightly negative


def _root(matrix_DD: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Score:
    """The Inception score of numbered images: exp of the mean divergence of p(class | image) from p(class).

    Consecutive images form splits of `split` images; the score is the mean over splits.

    Args:
        images: total number of images.
        classes: number of classes.
        split: images of a split.
        device: device of the sums.
    """

    def __init__(self, images: int, classes: int, split: int = SCORE_SPLIT, device: torch.device | str = "cpu"):
        self.split = split
        splits = -(-images // split)
        # Per split: Σ p of each class, Σ p log p, images.
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def update(self, first: int, probabilities_NK: Tensor) -> None:
        """Adds the class probabilities (N, K) of images `first`, first + 1, ..."""
        p = probabilities_NK.double()
        number = torch.arange(first, first + len(p), device=p.device) // self.split
        entropy = torch.special.xlogy(p, p).sum(1, keepdim=True)
        self.sums.index_add_(0, number, torch.cat([p, entropy, torch.ones_like(entropy)], 1))

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation of the score over the splits, for the images of all ranks. Collective."""
        sums = all_reduce_sum(self.sums.clone())
        count, p_K = sums[:, -1:], sums[:, :-2] / sums[:, -1:]
        divergence = sums[:, -2] / count[:, 0] - torch.special.xlogy(p_K, p_K).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(real_ND: Tensor, generated_MD: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall: the share of generated images in the manifold of real ones, and vice versa. Collective.

    A manifold is the union of balls around its images; each reaches to the `neighbours`-th nearest other image.

    Args:
        real_ND, generated_MD: all features, the same on every rank. The distances are distributed over ranks.
        neighbours: number of the neighbour that determines the radius.

    Returns:
        precision and recall.

    Raises ValueError unless both sets have more than `neighbours` images.
    """
    if min(len(real_ND), len(generated_MD)) <= neighbours:
        raise ValueError(f"sets of {len(real_ND)} and {len(generated_MD)} images: at least {neighbours + 1} are needed")
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    precision = _within(generated_MD, real_ND, _radii(real_ND, neighbours))
    recall = _within(real_ND, generated_MD, _radii(generated_MD, neighbours))
    return precision, recall


def _radii(x_ND: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of each vector to its `neighbours`-th nearest other vector."""
    radius_N = torch.zeros(len(x_ND), dtype=torch.float64, device=x_ND.device)
    for start in _shares(len(x_ND)):
        rows = _squared_distances(x_ND[start : start + _ROWS], x_ND)
        # + 1, because the nearest is the vector itself.
        radius_N[start : start + len(rows)] = rows.kthvalue(neighbours + 1, dim=1).values
    return all_reduce_sum(radius_N)


def _within(x_ND: Tensor, centre_MD: Tensor, radius_M: Tensor) -> float:
    """Share of the vectors that are in at least one of the balls, given by centres and squared radii."""
    inside = torch.zeros((), dtype=torch.float64, device=x_ND.device)
    for start in _shares(len(x_ND)):
        rows = _squared_distances(x_ND[start : start + _ROWS], centre_MD)
        inside += (rows <= radius_M).any(1).sum()
    return float(all_reduce_sum(inside)) / len(x_ND)


def _shares(count: int) -> range:
    return range(this_rank() * _ROWS, count, world_size() * _ROWS)


def _squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    squares = (x_ND**2).sum(1)[:, None] + (y_MD**2).sum(1)[None]
    return squares.addmm_(x_ND, y_MD.T, alpha=-2).clamp_(min=0)
