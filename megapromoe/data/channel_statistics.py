"""Mean and standard deviation of each channel of latents: summed over records, or given by a file.

Latents of 16 or more channels (VA-VAE, FLUX, RAE) have channels of different sizes, and are normalised by channel:
latents = (raw - mean) / deviation. The manifest records 1 / deviation as `scale` and the mean as `shift`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megapromoe.errors import UserError

_DEVIATIONS = ("std", "deviation", "stddev")
_VARIANCES = ("var", "variance")


class StatisticsError(UserError):
    """Statistics of latents cannot be used."""

    on_all_ranks = True  # every rank reads the same file


class ChannelSums:
    """Sums over the values of each channel, and over their squares.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums, self.squares = np.zeros(channels), np.zeros(channels)

    def add(self, record: np.ndarray, stochastic: bool) -> None:
        """Adds a record (views, parts, C, H, W); of a posterior, what its samples have on average."""
        values = record[:, 0].astype(np.float64)
        self.count += values[:, 0].size
        self.sums += values.sum(axis=(0, 2, 3))
        self.squares += np.square(values).sum(axis=(0, 2, 3))
        if stochastic:
            self.squares += np.exp(record[:, 1].astype(np.float64)).sum(axis=(0, 2, 3))

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON."""
        return {"count": self.count, "sums": self.sums.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def total(cls, parts: Iterable[dict[str, Any]]) -> ChannelSums:
        """The sums of parts, of which `to_json` wrote each."""
        parts = list(parts)
        total = cls(len(parts[0]["sums"]))
        for part in parts:
            total.count += part["count"]
            total.sums += part["sums"]
            total.squares += part["squares"]
        return total

    def normalisation(self, factor: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and shift of each channel, for a mean of 0 and a deviation of `factor`. Raises StatisticsError."""
        mean = self.sums / self.count
        deviation = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0.0))
        return scale_and_shift(mean, deviation, factor, "the latents")


def scale_and_shift(
    mean_C: np.ndarray, deviation_C: np.ndarray, factor: float, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel: latents = (raw - shift) * scale.

    Args:
        factor: standard deviation of the normalised latents.
        where: file of the statistics, for messages.

    Raises StatisticsError if a mean is not finite, or a deviation is not finite and positive.
    """
    for channel, (mean, deviation) in enumerate(zip(mean_C.tolist(), deviation_C.tolist(), strict=True)):
        # Less than what the rounding of the sums leaves of equal values counts as 0.
        if not math.isfinite(mean) or not math.isfinite(deviation) or deviation <= 1e-6 * abs(mean):
            raise StatisticsError(
                f"{where}: channel {channel} has mean {mean:g} and deviation {deviation:g}; a channel needs finite"
                " values, and a deviation above 0: correct them, or leave the channel out of the latents"
            )
    return tuple((factor / deviation_C).tolist()), tuple(mean_C.tolist())


def from_arrays(
    arrays: Mapping[str, np.ndarray], channels: int, factor: float, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift from the arrays `mean` and `std` or `var` of a file, with a value for each channel.

    Args:
        arrays: of the file; VA-VAE's latents_stats.pt has `mean` and `std` (1, C, 1, 1).
        channels: of the latents.
        factor, where: see `scale_and_shift`.

    Raises StatisticsError if they are missing, or do not have a value for each channel.
    """
    names = {name.lower(): name for name in arrays}
    spread = next((name for name in (*_DEVIATIONS, *_VARIANCES) if name in names), None)
    if "mean" not in names or spread is None:
        raise StatisticsError(
            f"{where}: holds {', '.join(arrays) or 'nothing'}, but no `mean` with `std` or `var`; give the statistics"
            " of the latents, or `--statistics compute`"
        )
    values = []
    for name in (names["mean"], names[spread]):
        array = np.asarray(arrays[name])
        if array.size != channels or max(array.shape, default=1) != channels or array.dtype.kind not in "fiu":
            raise StatisticsError(
                f"{where}: {name} is {array.dtype} {array.shape}, not a number for each of {channels} channels; give"
                " the statistics of these latents by channel, or `--statistics compute`"
            )
        values.append(array.reshape(-1).astype(np.float64))
    mean, deviation = values
    if spread in _VARIANCES:
        with np.errstate(invalid="ignore"):
            deviation = np.sqrt(deviation)  # of a negative one: NaN, which is refused
    return scale_and_shift(mean, deviation, factor, where)
