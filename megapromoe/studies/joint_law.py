"""Fits one law of active parameters N, routed experts E and training images D to all runs of a router.

    L(N, E, D) = e + a / N^α + b / E^β + c / D^γ

The sum of a constant, a term in parameters and one in data is that of Hoffmann et al. (arXiv 2203.15556). The separate
term for sparsity is that of Abnar et al. (arXiv 2501.12370), c / (1 - S)^λ with 1 - S the share of active experts: it
is proportional to 1 / E if the active experts stay the same. Laws with interactions (Clark et al., arXiv 2202.01169;
Ludziejewski et al., arXiv 2502.05172) have more constants than the grid of a small study determines. The test of the
residuals finds where one is missing.

The fit is that of Hoffmann et al.: Huber's loss of the residuals of log L, with a threshold of 0.001, from several
starts. Intervals come from a bootstrap over seeds: losses are drawn around the law with the deviations of `noise.py`,
of what a seed does to all runs, and of the rest. It is parametric for the reason in `fit.py`: studies have few seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from scipy.stats import f as f_distribution

from megapromoe.studies.fit import C_MAX, C_MIN, LEVEL, SPAN, FitError
from megapromoe.studies.noise import NoiseFloor, noise_floor

SYMBOLS = {"active_parameters": "N", "experts": "E", "images": "D"}
AXES = {"active_parameters": "preset or model.hidden_size", "experts": "model.num_experts", "images": "train.steps"}
CONSTANT = 1.05  # values within this factor are one value
LEVELS = 3  # values of a variable that a term with two constants needs, beside the common constant
CORRELATION = 0.95  # of logarithms; above, two variables cannot be told apart
HUBER = 1e-3
START_EXPONENTS, START_SHARES = (0.2, 0.8), (0.3, 0.8)  # share of the constant e in the smallest loss
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Term:
    """A term `coefficient / x^exponent`.

    Attributes:
        interval: 95 % interval of the exponent.
        gain: by how much the term falls from the smallest to the largest x.
        gain_interval: its 95 % interval.
    """

    coefficient: float
    exponent: float
    interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


@dataclass(frozen=True)
class JointLaw:
    """The fit to all runs of a router.

    Attributes:
        constant: e, with its 95 % interval.
        terms: of the variables that vary; the others are part of the constant.
        arms: number of different (N, E, D).
        fit_warnings: reasons against the law; empty if it is supported.
    """

    constant: float
    constant_interval: tuple[float, float]
    terms: dict[str, Term]
    arms: int
    runs: int
    fit_warnings: tuple[str, ...]

    def at(self, x: Mapping[str, np.ndarray]) -> np.ndarray:
        """The loss at values of the variables."""
        terms = [t.coefficient * np.asarray(x[name], dtype=float) ** -t.exponent for name, t in self.terms.items()]
        return self.constant + np.sum(terms, axis=0)

    def __str__(self) -> str:
        parts = [f"{t.coefficient:.3g} {SYMBOLS[name]}^-{t.exponent:.3g}" for name, t in self.terms.items()]
        return f"L = {self.constant:.4g} + {' + '.join(parts)}"


def fit_joint_law(
    x: Mapping[str, Sequence[float]], loss: Sequence[float], seeds: Sequence[int], replicates: int = 200, seed: int = 0
) -> JointLaw:
    """Fits the law to runs, one value of each variable, one loss and one seed each.

    Args:
        x: variable (a key of `SYMBOLS`) -> values.
        replicates: of the bootstrap.
        seed: of its random numbers.

    Raises FitError, with the remedy, if the grid cannot identify the law.
    """
    loss_R, seed_R = np.asarray(loss, dtype=float), np.asarray(seeds)
    x_VR = {name: np.asarray(values, dtype=float) for name, values in x.items()}
    if not (np.isfinite(loss_R) & (loss_R > 0)).all() or not all((v > 0).all() for v in x_VR.values()):
        raise FitError("losses and variables must be positive and finite")
    varying = {name: values for name, values in x_VR.items() if values.max() > CONSTANT * values.min()}
    _check_grid(varying)
    arm_R = np.unique(np.stack(list(x_VR.values()), axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    arms, parameters = int(arm_R.max()) + 1, 1 + 2 * len(varying)
    if arms <= parameters:
        raise FitError(
            f"{arms} points for {parameters} constants: the law needs at least {parameters + 1}; add points to the grid"
        )
    floor = _noise(arm_R, seed_R, loss_R)

    centre = {name: math.exp(np.log(values).mean()) for name, values in varying.items()}
    z_VR = np.stack([np.log(values / centre[name]) for name, values in varying.items()])
    best = _best(z_VR, loss_R)
    fitted_R = _law(best, z_VR)
    rest = floor.pair.value / math.sqrt(2) if floor.pair is not None else floor.single.value
    generator = np.random.default_rng(seed)
    replicate_NP = np.array([_fit(best, z_VR, fitted_R + _drawn(generator, floor, seed_R)) for _ in range(replicates)])
    replicate_NP = replicate_NP[np.isfinite(replicate_NP).all(axis=1)]
    constants = np.exp(replicate_NP[:, 0])
    terms = {}
    for i, name in enumerate(varying):
        low, high = z_VR[i].min(), z_VR[i].max()
        gains = [_gain(p[1 + 2 * i], p[2 + 2 * i], low, high) for p in (best, replicate_NP.T)]
        exponent = float(best[2 + 2 * i])
        terms[name] = Term(
            coefficient=float(np.exp(best[1 + 2 * i]) * centre[name] ** exponent),
            exponent=exponent,
            interval=_interval(replicate_NP[:, 2 + 2 * i]),
            gain=float(gains[0]),
            gain_interval=_interval(gains[1]),
        )
    off = _lack_of_fit(arm_R, loss_R, fitted_R, arms - parameters, rest, floor)
    # Twice the standard error of the difference of the means at the smallest and the largest value.
    noise = {name: 2 * rest * math.sqrt(2 * len(_levels(values)) / len(loss_R)) for name, values in varying.items()}
    warnings = _warnings(terms, noise, off)
    return JointLaw(float(np.exp(best[0])), _interval(constants), terms, arms, len(loss_R), warnings)


def _check_grid(varying: Mapping[str, np.ndarray]) -> None:
    """Raises FitError if the values of the variables cannot identify their terms."""
    if len(varying) < 2:
        what = f"nothing but {_name(next(iter(varying)))} varies" if varying else "nothing varies"
        raise FitError(f"{what}; a joint law needs two of {', '.join(map(_name, SYMBOLS))}")
    for name, values in varying.items():
        levels = _levels(values)
        if len(levels) < LEVELS:
            shown = " and ".join(f"{level:,.4g}" for level in levels)
            raise FitError(
                f"{_name(name)}: {len(levels)} values, {shown}; the term needs {LEVELS}: add values to the axis"
                f" {AXES[name]}"
            )
        if levels[-1] < SPAN * levels[0]:
            raise FitError(
                f"{_name(name)}: {levels[0]:,.4g} to {levels[-1]:,.4g}; the term needs a factor of {SPAN:g}: add values"
                f" to the axis {AXES[name]}"
            )
    for (first, x), (second, y) in itertools.combinations(varying.items(), 2):
        correlation = float(np.corrcoef(np.log(x), np.log(y))[0, 1])
        if abs(correlation) > CORRELATION:
            raise FitError(
                f"{_name(first)} and {_name(second)} vary together (correlation {correlation:+.2f}), as at one compute"
                " budget: their terms cannot be told apart; add points off this line, such as a second budget"
            )
    logs = np.stack([np.log(values) for values in varying.values()])
    if np.linalg.cond(np.corrcoef(logs)) > (1 + CORRELATION) / (1 - CORRELATION):
        names = ", ".join(map(_name, varying))
        raise FitError(f"{names} vary together: their terms cannot be told apart; vary each with the others fixed")


def _levels(values: np.ndarray) -> list[float]:
    """The different values, ascending; values that differ by less than `CONSTANT` are one."""
    levels: list[float] = []
    for value in sorted(values):
        if not levels or value > CONSTANT * levels[-1]:
            levels.append(float(value))
    return levels


def _noise(arm_R: np.ndarray, seed_R: np.ndarray, loss_R: np.ndarray) -> NoiseFloor:
    values: dict[int, dict[int, float]] = {}
    for arm, seed, loss in zip(arm_R, seed_R, loss_R, strict=True):
        values.setdefault(int(arm), {})[int(seed)] = float(loss)
    floor = noise_floor("loss", values)
    if floor is None:
        raise FitError("one run for each point: the noise is estimated from seeds; train some points with two seeds")
    return floor


def _law(p: np.ndarray, z_VR: np.ndarray) -> np.ndarray:
    """The law at logarithms of variables over their centres. `p`: log e, and (log coefficient, exponent) per term."""
    return np.exp(p[0]) + np.exp(p[1::2, None] - p[2::2, None] * z_VR).sum(0)


def _best(z_VR: np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    """The fit with the smallest Huber loss, of several starts."""
    solutions = []
    for share, *exponents in itertools.product(START_SHARES, *[START_EXPONENTS] * len(z_VR)):
        rest = (float(np.mean(loss_R)) - share * float(loss_R.min())) / len(z_VR)
        start = np.empty(1 + 2 * len(z_VR))
        start[0], start[1::2], start[2::2] = math.log(share * loss_R.min()), math.log(rest), exponents
        solutions.append(_minimum(start, z_VR, loss_R))
    return np.asarray(min(solutions, key=lambda solution: solution.cost).x)


def _fit(start: np.ndarray, z_VR: np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    """The local minimum of the Huber loss from a start; not a number if a loss is not positive."""
    if (loss_R <= 0).any():
        return np.full_like(start, np.nan)
    return np.asarray(_minimum(start, z_VR, loss_R).x)


def _minimum(start: np.ndarray, z_VR: np.ndarray, loss_R: np.ndarray) -> OptimizeResult:
    """The local minimum of the Huber loss from a start, with its `cost`. Losses are positive."""
    log_R = np.log(loss_R)

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(_law(p, z_VR)) - log_R

    def jacobian(p: np.ndarray) -> np.ndarray:
        term_VR = np.exp(p[1::2, None] - p[2::2, None] * z_VR)
        law_R = np.exp(p[0]) + term_VR.sum(0)
        columns = np.empty((len(p), len(loss_R)))
        columns[0], columns[1::2], columns[2::2] = np.exp(p[0]), term_VR, -term_VR * z_VR
        return (columns / law_R).T

    low, high = np.full_like(start, -20.0), np.full_like(start, 20.0)
    low[2::2], high[2::2] = C_MIN, C_MAX
    begin = np.clip(start, low + 1e-6, high - 1e-6)
    limits = (low, high)
    return least_squares(
        residuals, begin, jacobian, bounds=limits, x_scale="jac", loss="huber", f_scale=HUBER, max_nfev=300
    )


def _drawn(generator: np.random.Generator, floor: NoiseFloor, seed_R: np.ndarray) -> np.ndarray:
    """Deviations of all runs: of their seeds and of the rest, each with an uncertain standard deviation."""
    pair = floor.pair
    rest = floor.single if pair is None else pair.times(math.sqrt(0.5))
    rest_variance = rest.value**2 * rest.freedom / generator.chisquare(rest.freedom)
    seeds, number_R = np.unique(seed_R, return_inverse=True)
    freedom = max(1, len(seeds) - 1)
    shift_variance = max(floor.single.value**2 - rest.value**2, 0.0) * freedom / generator.chisquare(freedom)
    shift_S = math.sqrt(shift_variance) * generator.standard_normal(len(seeds))
    return shift_S[number_R] + math.sqrt(rest_variance) * generator.standard_normal(len(seed_R))


def _gain(log_coefficient, exponent, low: float, high: float):
    return np.exp(log_coefficient - exponent * low) - np.exp(log_coefficient - exponent * high)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, _TAILS)
    return float(low), float(high)


def _lack_of_fit(
    arm_R: np.ndarray, loss_R: np.ndarray, fitted_R: np.ndarray, freedom: int, rest: float, floor: NoiseFloor
) -> bool:
    """Whether the means lie off the law by more than the seeds explain, at the 5 % level."""
    count_A = np.bincount(arm_R)
    off_A = np.bincount(arm_R, loss_R - fitted_R) / count_A
    off_A = off_A - (count_A * off_A).sum() / count_A.sum()  # what seeds do to all runs is part of the constant
    square = float((count_A * off_A**2).sum()) / freedom
    noise = floor.single if floor.pair is None else floor.pair
    if rest < 1e-9 * loss_R.mean():  # seeds do not differ: only rounding is no lack of fit
        return square > (1e-6 * loss_R.mean()) ** 2
    return bool(f_distribution.sf(square / rest**2, freedom, noise.freedom) < 1 - LEVEL)


def _warnings(terms: Mapping[str, Term], noise: Mapping[str, float], off: bool) -> tuple[str, ...]:
    warnings = []
    for name, term in terms.items():
        if term.gain <= noise[name]:
            warnings.append(f"the loss does not fall with {_name(name)} by more than the seeds differ")
        elif term.interval[0] <= 1.05 * C_MIN or term.interval[1] >= 0.95 * C_MAX:
            warnings.append(f"the exponent of {_name(name)} is not determined")
    if off:
        warnings.append("the means lie off the law by more than the seeds explain; a sum of terms may be too simple")
    return tuple(warnings)


def _name(variable: str) -> str:
    return {"active_parameters": "active parameters", "experts": "experts", "images": "images"}[variable]
