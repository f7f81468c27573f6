"""Measures of what experts have learned, on numpy arrays. Reports print the docstrings as definitions.

Letters: T tokens, D channels, E experts, C classes, U subsets of classes, F an expert's hidden units.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NO_EXPERT = -1  # the group of a token that is in no group


def definition(measure: Any) -> str:
    """The definition of a measure: its docstring without the sections on arguments and source."""
    return re.split(r"\n\n(?:Args|Returns|Raises|Source):", inspect.getdoc(measure) or "")[0]


# ---- load


def load(rows_E: np.ndarray) -> np.ndarray:
    """Share of the rows that each expert processes. A row is a pair of a token and one of its experts: a token with two
    experts has two rows, a token without an expert has none. 0 for all experts if there are no rows."""
    return rows_E / np.maximum(rows_E.sum(-1, keepdims=True), 1)


def evenness(share_E: np.ndarray) -> np.ndarray:
    """Entropy of the load divided by its maximum, log E: 1 for an equal load, 0 if one expert has all rows."""
    share_E = np.asarray(share_E, dtype=float)
    entropy = -(share_E * np.log(np.maximum(share_E, 1e-300))).sum(-1)
    return entropy / np.log(max(share_E.shape[-1], 2))


def information(rows_CE: np.ndarray) -> np.ndarray:
    """Mutual information of class and expert in bits, with the shares of the rows as probabilities. 0 if all classes
    use the experts equally, at most log2 E. With few rows it is biased upwards: for independent rows without any
    relation it is about (C-1)·(E-1) / (2·ln 2·rows)."""
    joint_CE = rows_CE / np.maximum(rows_CE.sum((-2, -1), keepdims=True), 1)
    product_CE = joint_CE.sum(-2, keepdims=True) * joint_CE.sum(-1, keepdims=True)
    ratio_CE = np.divide(joint_CE, product_CE, out=np.ones_like(joint_CE), where=joint_CE > 0)
    return (joint_CE * np.log2(ratio_CE)).sum((-2, -1))


# ---- subsets of classes


def subset_load(rows_CE: np.ndarray, subsets: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Load of the experts over the images of each subset of classes (U, E)."""
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
    mean: 0 if the subsets use the experts equally, 1 if they have no expert in common. Undefined for a subset without
    rows."""
    middle_E = (np.asarray(p_E, dtype=float) + np.asarray(q_E, dtype=float)) / 2
    return (kullback_leibler(p_E, middle_E) + kullback_leibler(q_E, middle_E)) / 2


def pairwise(divergence, share_UE: np.ndarray) -> np.ndarray:
    """A divergence of every pair of subsets (U, U)."""
    return np.array([[divergence(p_E, q_E) for q_E in share_UE] for p_E in share_UE])


# ---- routers and experts


def cosine_matrix(vector_ED: np.ndarray) -> np.ndarray:
    """Cosine of the router vectors of every pair of experts: prototypes (ProMoE), centroids (k-means), means (gmm),
    rows of the gate or of the classifier. 1 on the diagonal; elsewhere near 0 if experts take different tokens, near 1
    if two experts compete for the same. For random vectors it is 0 ± 1/√D."""
    vector_ED = np.asarray(vector_ED, dtype=float)
    unit_ED = vector_ED / np.maximum(np.linalg.norm(vector_ED, axis=-1, keepdims=True), 1e-12)
    return unit_ED @ unit_ED.T


def subspace_overlap(weight_Eab: np.ndarray, k: int) -> np.ndarray:
    """Overlap of the subspaces of every pair of experts: ‖UᵢᵀUⱼ‖²/k, the mean squared cosine of the angles between
    them. A subspace is spanned by the k left singular vectors of a weight matrix with the largest singular values. 1:
    the same subspace, 0: orthogonal; for two random subspaces of n dimensions it is k/n. Lower values mean more diverse
    experts.

    Args:
        weight_Eab: a matrix (a, b) for each expert; n is a.
        k: 1..min(a, b).

    Source: LoRA (arXiv 2106.09685), section 7.2; ProMoE (arXiv 2510.24711), figure 1.
    """
    bases_Eak = [np.linalg.svd(np.asarray(w, dtype=np.float64), full_matrices=False)[0][:, :k] for w in weight_Eab]
    return np.array([[np.square(u.T @ v).sum() / k for v in bases_Eak] for u in bases_Eak])


def off_diagonal_mean(matrix_EE: np.ndarray) -> float:
    """Mean over all pairs of different experts; NaN for a single expert."""
    off_diagonal = ~np.eye(len(matrix_EE), dtype=bool)
    return float(matrix_EE[off_diagonal].mean()) if off_diagonal.any() else float("nan")


# ---- tokens


def distance_ratio(x_TD: np.ndarray, group_T: np.ndarray) -> float:
    """Inter-group distance divided by intra-group distance: the mean distance between the centroids of two groups,
    divided by the mean distance of a token from the centroid of its group (Euclidean, over the tokens that are in a
    group). Large values mean compact groups that are far apart. Undefined for fewer than two groups.

    Args:
        x_TD: the router's input.
        group_T: class, expert or cluster of each token; -1: in no group.

    Source: ProMoE (arXiv 2510.24711), figure 1, which gives the ratio over 10 k-means clusters but no formula. Its
    ratios are below 1, so it cannot use distances between the tokens of two clusters, which exceed those within one.
    """
    kept = group_T != NO_EXPERT
    x_TD, group_T = np.asarray(x_TD, dtype=float)[kept], np.asarray(group_T)[kept]
    names, group_T = np.unique(group_T, return_inverse=True)
    if len(names) < 2:
        return float("nan")
    middle_GD = np.stack([x_TD[group_T == g].mean(0) for g in range(len(names))])
    within = np.linalg.norm(x_TD - middle_GD[group_T], axis=1).mean()
    distance_GG = np.linalg.norm(middle_GD[:, None] - middle_GD[None], axis=-1)
    return float(off_diagonal_mean(distance_GG) / within) if within else float("inf")


def clusters(x_TD: np.ndarray, count: int = 10, seed: int = 0) -> np.ndarray:
    """Ten k-means clusters of the tokens, by scikit-learn, as in the paper."""
    from sklearn.cluster import KMeans  # slow to import

    count = min(count, len(x_TD))
    return KMeans(count, n_init=4, random_state=seed).fit_predict(np.asarray(x_TD, dtype=np.float64))


def t_sne(x_TD: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of tokens into the plane (T, 2): near neighbours stay near, but large distances and the sizes of clusters
    have no meaning. Computed by scikit-learn with a fixed seed, initialized by the two principal components, with
    perplexity 30 (less for few tokens)."""
    from sklearn.manifold import TSNE  # slow to import

    perplexity = min(30.0, (len(x_TD) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return model.fit_transform(np.asarray(x_TD, dtype=np.float32))
