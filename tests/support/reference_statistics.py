"""Statistics of features by numpy and scipy, to hold ours against."""

import numpy as np
import torch
from scipy import linalg

from megapromoe.evaluation.statistics import Normal


def normal(x):
    return Normal(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False)), len(x))


def published_frechet(a, b):
    """By the square root of the product of covariances, as pytorch-fid and guided-diffusion compute it."""
    (m, A), (n, B) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return (m - n) @ (m - n) + np.trace(A) + np.trace(B) - 2 * np.trace(linalg.sqrtm(A @ B).real)
