"""Measures of what experts learnt, on numpy arrays. The docstrings are the definitions that reports print.

Letters: T tokens, D channels, E experts, C classes, U subsets of classes, F an expert's hidden units.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOBODY = -1  # the group of a token that belongs to none


def definition(measure: Any) -> str:
    """What a measure says of itself: its docstring up to its arguments."""
    return re.split(r"\n\n(?:Args|Returns|Raises|Source):", inspect.getdoc(measure) or "")[0]


# ---- load


def load(rows_E: np.ndarray) -> np.ndarray:
    """Share of the rows that goes to each expert. A row is a token on its way to one expert: a token that visits two
    experts has two, one that nobody takes has none. 0 for all without rows."""
    return rows_E / np.maximum(rows_E.sum(-1, keepdims=True), 1)


def evenness(share_E: np.ndarray) -> np.ndarray:
    """Entropy of the load over its largest value, log E: 1 if all experts work alike, 0 if one does all."""
    share_E = np.asarray(share_E, dtype=float)
    entropy = -(share_E * np.log(np.maximum(share_E, 1e-300))).sum(-1)
    return entropy / np.log(max(share_E.shape[-1], 2))


def information(rows_CE: np.ndarray) -> np.ndarray:
    """Mutual information of class and expert in bits, with the rows' shares as probabilities: what the expert of a row
    tells of its class. 0 if all classes use the experts alike, at most log2 E. Few rows make it too large: by about
    (C-1)·(E-1) / (2·ln 2·rows) where there is none, if rows were independent."""
    joint_CE = rows_CE / np.maximum(rows_CE.sum((-2, -1), keepdims=True), 1)
    apart_CE = joint_CE.sum(-2, keepdims=True) * joint_CE.sum(-1, keepdims=True)
    ratio_CE = np.divide(joint_CE, apart_CE, out=np.ones_like(joint_CE), where=joint_CE > 0)
    return (joint_CE * np.log2(ratio_CE)).sum((-2, -1))


# ---- subsets of classes


def subset_load(rows_CE: np.ndarray, subsets: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Load of the experts over the images of each subset of classes alone (U, E)."""
    return np.stack([load(rows_CE[list(classes)].sum(0)) for classes in subsets.values()])


def kullback_leibler(p_E: np.ndarray, q_E: np.ndarray) -> float:
    """Kullback-Leibler divergence of two loads in bits, Σ p·log2(p/q): 0 if they are equal, infinite if the first uses
    an expert that the second never does. Undefined for a subset without rows."""
    p_E, q_E = np.asarray(p_E, dtype=float), np.asarray(q_E, dtype=float)
    if not p_E.sum() or not q_E.sum():
        return float("nan")
    used = p_E > 0
    if not q_E[used].all():
        return float("inf")
    return max(float((p_E[used] * np.log2(p_E[used] / q_E[used])).sum()), 0.0)


def jensen_shannon(p_E: np.ndarray, q_E: np.ndarray) -> float:
    """Jensen-Shannon divergence of two loads in bits, the mean of the Kullback-Leibler divergences of both from their
    mean: 0 if the subsets use the experts alike, 1 if they share none. Undefined for a subset without rows."""
    middle_E = (np.asarray(p_E, dtype=float) + np.asarray(q_E, dtype=float)) / 2
    return (kullback_leibler(p_E, middle_E) + kullback_leibler(q_E, middle_E)) / 2


def between(divergence, share_UE: np.ndarray) -> np.ndarray:
    """A divergence of every subset from every other (U, U)."""
    return np.array([[divergence(p_E, q_E) for q_E in share_UE] for p_E in share_UE])


# ---- routers and experts


def cosine_matrix(vector_ED: np.ndarray) -> np.ndarray:
    """Cosine of every two experts' vectors in the router: prototypes (ProMoE), centroids (k-means), rows of the gate or
    of the classifier. 1 on the diagonal; near 0 elsewhere if experts wait for different tokens, near 1 if two compete.
    The random baseline is 0, give or take 1/√D."""
    vector_ED = np.asarray(vector_ED, dtype=float)
    unit_ED = vector_ED / np.maximum(np.linalg.norm(vector_ED, axis=-1, keepdims=True), 1e-12)
    return unit_ED @ unit_ED.T


def subspace_overlap(weight_Eab: np.ndarray, k: int) -> np.ndarray:
    """Overlap of every two experts' subspaces, those spanned by the k left singular vectors of a weight matrix with the
    largest singular values: ‖UᵢᵀUⱼ‖²/k, the mean squared cosine of the angles between them. 1: the same subspace,
    0: orthogonal; two random subspaces of n dimensions overlap by k/n. Lower means more diverse experts.

    Args:
        weight_Eab: a matrix (a, b) for each expert; n is a.
        k: 1..min(a, b).

    Source: LoRA (arXiv 2106.09685), section 7.2; ProMoE (arXiv 2510.24711), figure 1.
    """
    bases_Eak = [np.linalg.svd(np.asarray(w, dtype=np.float64), full_matrices=False)[0][:, :k] for w in weight_Eab]
    return np.array([[np.square(u.T @ v).sum() / k for v in bases_Eak] for u in bases_Eak])


def off_diagonal_mean(matrix_EE: np.ndarray) -> float:
    """Mean over all pairs of different experts; undefined for one."""
    apart = ~np.eye(len(matrix_EE), dtype=bool)
    return float(matrix_EE[apart].mean()) if apart.any() else float("nan")


# ---- tokens


def distance_ratio(x_TD: np.ndarray, group_T: np.ndarray) -> float:
    """Inter- over intra-group distance: the mean distance between the centroids of two groups, over the mean distance
    of a token from the centroid of its group (Euclidean, over the tokens that belong to a group). Large: compact
    groups, far apart. Undefined for fewer than two groups.

    Args:
        x_TD: what the router sees.
        group_T: classes, experts or clusters; -1 belongs to none.

    Source: ProMoE (arXiv 2510.24711), figure 1, which gives the ratio over 10 k-means clusters but no formula. It
    finds ratios under 1, so distances between the tokens of two clusters cannot be meant: they exceed those within.
    """
    kept = group_T != NOBODY
    x_TD, group_T = np.asarray(x_TD, dtype=float)[kept], np.asarray(group_T)[kept]
    names, group_T = np.unique(group_T, return_inverse=True)
    if len(names) < 2:
        return float("nan")
    middle_GD = np.stack([x_TD[group_T == g].mean(0) for g in range(len(names))])
    within = np.linalg.norm(x_TD - middle_GD[group_T], axis=1).mean()
    apart_GG = np.linalg.norm(middle_GD[:, None] - middle_GD[None], axis=-1)
    return float(off_diagonal_mean(apart_GG) / within) if within else float("inf")


def clusters(x_TD: np.ndarray, count: int = 10, seed: int = 0) -> np.ndarray:
    """Ten k-means clusters of the tokens, by scikit-learn; the paper groups tokens by such."""
    from sklearn.cluster import KMeans  # slow to import

    count = min(count, len(x_TD))
    return KMeans(count, n_init=4, random_state=seed).fit_predict(np.asarray(x_TD, dtype=np.float64))


def t_sne(x_TD: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of tokens into the plane (T, 2): near neighbours stay near, while distances far apart and the sizes of
    clumps mean nothing. Scikit-learn's, with a fixed seed, starting from the two principal components, perplexity 30
    (less for few tokens)."""
    from sklearn.manifold import TSNE  # slow to import

    perplexity = min(30.0, (len(x_TD) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return model.fit_transform(np.asarray(x_TD, dtype=np.float32))
