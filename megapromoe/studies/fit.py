"""Fits a power law to losses, with confidence intervals and warnings where the fit is not supported.

    L(x) = a + b · x^-c

For a given c the law is linear in a and b, so the fit is a search over c alone. Uncertainty comes from a bootstrap over
seeds: the loss of every run is resampled around the law, with the standard deviation of the runs at the same x. This is
a parametric bootstrap, because resampling the runs themselves needs more than the two or three seeds of a study: there
would be few different samples, all with too little variance. The standard deviation is uncertain too, so it is
resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution

from megapromoe.errors import UserError

C_MIN, C_MAX = 0.02, 8.0  # below, the law is indistinguishable from a logarithm; above, from a step
GRID = np.geomspace(C_MIN, C_MAX, 400)
LEVEL = 0.95
SPAN = 2.0  # minimum ratio of largest to smallest x; over a smaller range a power law is not identifiable


class FitError(UserError):
    """Points to which no power law can be fitted."""


@dataclass(frozen=True)
class PowerLaw:
    """The best fit. Intervals contain 95 % of the bootstrap; `fit_warnings` are the reasons against the fit."""

    a: float
    b: float
    c: float
    a_interval: tuple[float, float]
    c_interval: tuple[float, float]
    spread: float
    """Pooled standard deviation of runs with the same x."""
    points: int
    runs: int
    fit_warnings: tuple[str, ...]
    replicates: np.ndarray
    """Bootstrap replicates, (replicates, 3): a, b, c of each."""

    def at(self, x: np.ndarray) -> np.ndarray:
        """The law as text, with the interval of the exponent."""
        return self.a + self.b * np.asarray(x, dtype=float) ** -self.c

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the law's 95 % interval at each x."""
        a, b, c = self.replicates.T[..., None]
        return tuple(np.quantile(a + b * np.asarray(x, dtype=float) ** -c, _TAILS, axis=0))

    def __str__(self) -> str:
        low, high = self.c_interval
        return f"L = {self.a:.4g} + {self.b:.3g} x^-{self.c:.3g}, exponent in [{low:.2g}, {high:.2g}]"


_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def fit_power_law(x: np.ndarray, loss: np.ndarray, replicates: int = 2000, seed: int = 0) -> PowerLaw:
    """Fits the law to all runs, one (x, loss) each, and tests the result.

    Raises FitError for fewer than four different x (a law with three parameters fits any three points), if no x has two
    runs (the noise cannot be estimated), for an x that is not positive, and for x whose range is below a factor of two.
    """
    x, loss = np.asarray(x, dtype=float), np.asarray(loss, dtype=float)
    if x.shape != loss.shape or x.ndim != 1:
        raise FitError(f"{x.shape} x and {loss.shape} losses: give one loss for each x")
    if not np.isfinite(loss).all() or not (np.isfinite(x) & (x > 0)).all():
        raise FitError("x must be positive, and all of it finite")
    values, place = np.unique(x, return_inverse=True)
    points, runs = len(values), len(x)
    if points < 4:
        raise FitError(f"{points} different x: a law with three parameters needs at least four")
    if values[-1] / values[0] < SPAN:
        raise FitError(
            f"x ranges from {values[0]:.4g} to {values[-1]:.4g}; a fit needs a range of at least a factor {SPAN:g}"
        )
    freedom = runs - points
    if not freedom:
        raise FitError("one run for each x: the noise is estimated from seeds, so at least one x needs two seeds")
    unit = np.exp(np.log(values).mean())  # scale of x, so that the search does not depend on its unit
    means = np.bincount(place, loss) / np.bincount(place)
    within = float(((loss - means[place]) ** 2).sum())
    spread = np.sqrt(within / freedom)

    a, b, c = _best(x / unit, loss)
    law = a + b * (x / unit) ** -c
    generator = np.random.default_rng(seed)
    sigma_R = spread * np.sqrt(freedom / generator.chisquare(freedom, replicates))
    drawn_NR = law[:, None] + sigma_R * generator.standard_normal((runs, replicates))
    abc = _best_on_grid(x / unit, drawn_NR)
    abc[:, 1] *= unit ** abc[:, 2]
    a_interval, c_interval = (tuple(np.quantile(abc[:, i], _TAILS)) for i in (0, 2))
    fit_warnings = _doubts(
        values, means, np.bincount(place), within, freedom, float(((loss - law) ** 2).sum()), b, c_interval
    )
    return PowerLaw(a, b * unit**c, c, a_interval, c_interval, float(spread), points, runs, fit_warnings, abc)


def _doubts(values, means, count, within, freedom, residual, b, c_interval) -> tuple[str, ...]:
    """Reasons against the law, from an analysis of variance at the 5 % level."""
    fit_warnings, points = [], len(values)
    mean = (means * count).sum() / count.sum()
    between = float((count * (means - mean) ** 2).sum())
    if not _exceeds(between, points - 1, within, freedom):
        fit_warnings.append("the losses differ with x no more than with the seed")
    if b <= 0:
        fit_warnings.append("the loss rises with x")
    if _exceeds(residual - within, points - 3, within, freedom):
        fit_warnings.append("the means lie off the law by more than the seeds explain")
    if c_interval[0] <= GRID[1] or c_interval[1] >= GRID[-2]:
        fit_warnings.append(f"the exponent is not determined: its interval reaches an end of [{C_MIN}, {C_MAX}]")
    return tuple(fit_warnings)


def _exceeds(squares: float, of: int, within: float, freedom: int) -> bool:
    """Whether a mean square exceeds the 95 % quantile that noise alone would give."""
    if within == 0:
        return squares > 0
    ratio = max(squares, 0.0) / of / (within / freedom)
    return bool(f_distribution.sf(ratio, of, freedom) < 1 - LEVEL)


def _best(x: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
    """Least squares: the best point of the grid, refined by an optimizer."""
    start = _best_on_grid(x, loss[:, None])[0]

    def error(abc: np.ndarray) -> np.ndarray:
        return abc[0] + abc[1] * x ** -abc[2] - loss

    bounds = ([-np.inf, -np.inf, C_MIN], [np.inf, np.inf, C_MAX])
    start[2] = np.clip(start[2], C_MIN * 1.0001, C_MAX * 0.9999)
    solution = least_squares(error, start, bounds=bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac")
    a, b, c = solution.x if solution.cost <= 0.5 * (error(start) ** 2).sum() else start
    return float(a), float(b), float(c)


def _best_on_grid(x: np.ndarray, loss_NR: np.ndarray) -> np.ndarray:
    """(a, b, c) of least squares for each column of losses, c on the grid: (R, 3)."""
    best_R = np.full(loss_NR.shape[1], -np.inf)
    place_R = np.zeros(loss_NR.shape[1], dtype=int)
    for i, c in enumerate(GRID):  # orthonormal basis of the law for this c; the residual is what its projection leaves
        basis, _ = np.linalg.qr(np.stack([np.ones_like(x), x**-c], axis=1))
        held_R = ((basis.T @ loss_NR) ** 2).sum(0)
        better_R = held_R > best_R
        best_R[better_R], place_R[better_R] = held_R[better_R], i
    abc = np.empty((loss_NR.shape[1], 3))
    for i in np.unique(place_R):
        columns = place_R == i
        design = np.stack([np.ones_like(x), x ** -GRID[i]], axis=1)
        abc[columns, :2] = np.linalg.lstsq(design, loss_NR[:, columns], rcond=None)[0].T
        abc[columns, 2] = GRID[i]
    return abc
