"""Choices from counter-based random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from megapromoe.diffusion.noise import raw_bits

Value = TypeVar("Value")

WORDS = 64  # random words that are drawn at once


class Draws:
    """A sequence of random choices, which depends on (seed, purpose, index) only.

    Args:
        seed: any integer.
        purpose: name of the stream, as for `noise.raw_bits`.
        index: position in the stream, not negative.
    """

    def __init__(self, seed: int, purpose: str, index: int):
        self._seed, self._purpose, self._index = seed, purpose, np.array([index])
        self._blocks = 0
        self._words: list[int] = []

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1, each with the same probability (to 2^-59)."""
        if not self._words:
            purpose = f"{self._purpose}, block {self._blocks}"
            self._words = raw_bits(self._seed, purpose, self._index, WORDS)[0].tolist()[::-1]
            self._blocks += 1
        return self._words.pop() % count

    def one_of(self, values: Sequence[Value]) -> Value:
        """One of the values, each with the same probability."""
        return values[self.below(len(values))]

    def happens(self, percent: int) -> bool:
        """True with a probability of `percent` / 100."""
        return self.below(100) < percent

    def shuffled(self, values: Sequence[Value]) -> list[Value]:
        """The values in a random order."""
        shuffled = list(values)
        for last in range(len(shuffled) - 1, 0, -1):  # Fisher and Yates
            other = self.below(last + 1)
            shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
        return shuffled
