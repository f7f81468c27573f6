"""The learning rate of each step, and a description of settings that changed since the last start of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from megapromoe.config.options import Config
from megapromoe.config.reader import as_kind, kind_of
from megapromoe.config.train_options import TrainConfig


def learning_rate(t: TrainConfig, step: int) -> float:
    """The learning rate after `step` steps: warm-up from lr/warmup to lr, then by `train.schedule`.

    Source of wsd: Hu et al. (MiniCPM), arXiv 2404.06395; of the shape 1-sqrt, and that 0.2 of the steps suffice for the
    decay: Hägele et al., arXiv 2405.18392.
    """
    if step < t.warmup:
        return t.lr * (step + 1) / t.warmup
    if t.schedule == "constant":
        return t.lr
    if t.schedule == "wsd":
        start = t.decay_start_step
        if step <= start:
            return t.lr
        done = min((step - start) / max(1, t.steps - start), 1.0)
        return t.min_lr + (t.lr - t.min_lr) * (1 - (done if t.decay_shape == "linear" else math.sqrt(done)))
    done = (step - t.warmup) / max(1, t.steps - t.warmup)
    return t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def describe_changes(config: Config, changed: Mapping[str, Sequence[Any]], step: int) -> list[str]:
    """A line for each changed setting, then one for the learning rate if the changes affect that of the next step.

    Args:
        config: the configuration of this start.
        changed: dotted name -> [value at the last start, value now].
        step: number of completed steps, 0 for a new run.
    """
    lines = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
    before = _train_before(config.train, changed)
    if 0 < step < config.train.steps and before is not None:
        expected, now = learning_rate(before, step), learning_rate(config.train, step)
        if now != expected:
            last = learning_rate(before, step - 1)
            lines.append(
                f"learning rate: {last:.4g} at step {step} -> {now:.4g} at step {step + 1}"
                f" ({expected:.4g} without these changes)"
            )
    return lines


def _train_before(train: TrainConfig, changed: Mapping[str, Sequence[Any]]) -> TrainConfig | None:
    """`train` with the values of the last start; None if one of them is not a valid value of its field."""
    old = {}
    for field in fields(TrainConfig):
        key = f"train.{field.name}"
        if key in changed:
            old[field.name] = as_kind(changed[key][0], kind_of(field))
    return None if None in old.values() else replace(train, **old)
