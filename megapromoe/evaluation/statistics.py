"""The figures by which sets of images are compared, from their features: streamed, float64, shared out over ranks.

* Fréchet distance of two normal distributions. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
* Inception score. Source: Salimans et al. 2016 (arXiv 1606.03498).
* Precision and recall of manifolds made of nearest neighbours. Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megapromoe.distributed.agreement import all_reduce_sum, this_rank, world_size

SCORE_SPLIT = 5000  # images of one split of the Inception score: 10 splits of the usual 50,000
NEIGHBOURS = 3
_ROWS = 512  # rows of a matrix of distances made at once; the same on any number of ranks, hence the same bits


@dataclass(frozen=True)
class Normal:
    """A normal distribution: mean (D,), covariance (D, D), float64 on the CPU; fitted to `count` vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


class Moments:
    """Mean and covariance of vectors that come batch by batch, in one pass.

    Deviations are summed around the mean so far, so that nothing cancels. Source: Chan, Golub and LeVeque 1979.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x_ND: Tensor) -> None:
        """Takes in a batch (N, D)."""
        x_ND = x_ND.double()
        mean = x_ND.mean(0)
        centred = x_ND - mean
        total = self.count + len(x_ND)
        apart = mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(apart, apart) * (self.count * len(x_ND) / total)
        self.mean += apart * (len(x_ND) / total)
        self.count = total

    def normal(self) -> Normal:
        """The distribution of what all ranks took in, the covariance unbiased. Collective.

        Raises ValueError for fewer than two vectors.
        """
        count = int(all_reduce_sum(torch.tensor(self.count, device=self.mean.device)))
        if count < 2:
            raise ValueError(f"a covariance needs two vectors at least, not {count}")
        mean = all_reduce_sum(self.mean * self.count) / count
        apart = self.mean - mean
        scatter = all_reduce_sum(self.scatter + torch.outer(apart, apart) * self.count)
        return Normal(mean.cpu(), scatter.cpu() / (count - 1), count)


def frechet_distance(a: Normal, b: Normal) -> float:
    """|mean difference|² + tr(A + B - 2 (A B)^½), float64.

    tr (A B)^½ is the sum of the singular values of A^½ B^½, which is exact also where covariances are near singular;
    the square root of the product A B, which is not symmetric, is not.
    """
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    shared = torch.linalg.svdvals(root_a @ root_b).sum()
    apart = a.mean - b.mean
    distance = apart @ apart + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(float(distance), 0.0)  # equal distributions: 0 to rounding


def _root(matrix_DD: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Score:
    """The Inception score of numbered images: exp of the mean divergence of p(class | image) from p(class).

    Images are split by their number into stretches of `split`; the score is the mean over splits.
    """

    def __init__(self, images: int, classes: int, split: int = SCORE_SPLIT, device: torch.device | str = "cpu"):
        self.split = split
        splits = -(-images // split)
        # Per split: Σ p of each class, Σ p log p, images.
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def update(self, first: int, probabilities_NK: Tensor) -> None:
        """Takes in images `first`, first + 1, ..."""
        p = probabilities_NK.double()
        number = torch.arange(first, first + len(p), device=p.device) // self.split
        entropy = torch.special.xlogy(p, p).sum(1, keepdim=True)
        self.sums.index_add_(0, number, torch.cat([p, entropy, torch.ones_like(entropy)], 1))

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits, of what all ranks took in. Collective."""
        sums = all_reduce_sum(self.sums.clone())
        count, p_K = sums[:, -1:], sums[:, :-2] / sums[:, -1:]
        divergence = sums[:, -2] / count[:, 0] - torch.special.xlogy(p_K, p_K).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(real_ND: Tensor, drawn_MD: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of drawn images within the manifold of the real ones, and of real ones within that of the drawn.

    A manifold is the union of the balls around its images that reach to their `neighbours`-th nearest other image.

    Args:
        real_ND, drawn_MD: all features, the same on every rank. Ranks share out the distances.

    Raises ValueError if a set has no more than `neighbours` images. Collective.
    """
    if min(len(real_ND), len(drawn_MD)) <= neighbours:
        raise ValueError(f"sets of {len(real_ND)} and {len(drawn_MD)} images: {neighbours + 1} are needed at least")
    real_ND, drawn_MD = real_ND.double(), drawn_MD.double()
    precision = _within(drawn_MD, real_ND, _radii(real_ND, neighbours))
    recall = _within(real_ND, drawn_MD, _radii(drawn_MD, neighbours))
    return precision, recall


def _radii(x_ND: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each vector to its k-th nearest other one."""
    radius_N = torch.zeros(len(x_ND), dtype=torch.float64, device=x_ND.device)
    for start in _shares(len(x_ND)):
        rows = _squared_distances(x_ND[start : start + _ROWS], x_ND)
        # The nearest is the vector itself.
        radius_N[start : start + len(rows)] = rows.kthvalue(neighbours + 1, dim=1).values
    return all_reduce_sum(radius_N)


def _within(x_ND: Tensor, centre_MD: Tensor, radius_M: Tensor) -> float:
    """Share of the vectors that lie in any of the balls, given by centres and squared radii."""
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
