"""The decay of the averaged weights at each update, and the share of the initial weights in the average.

With warm-up the decay of update t = 1, 2, ... is min(decay, (1 + t) / (10 + t)): early in a run the average covers
about its last ninth, and the share of the initial weights soon vanishes. Source: TensorFlow's ExponentialMovingAverage
(`num_updates`), as in Latent Diffusion's LitEma, which counts the first update as 1. Without warm-up the decay is
constant, as published for the large models, and the initial weights have a share of decay^updates in the average.
"""

from __future__ import annotations


def decay_at(update: int, decay: float, warmup: bool) -> float:
    """The decay of update number `update`, counted from 1 over the applied updates of a run."""
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


def constant_share(decay: float, updates: int) -> float:
    """The share of the initial weights in an average of constant decay after a number of updates."""
    return decay**updates
