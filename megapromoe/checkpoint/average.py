"""What a checkpoint says of its averaged weights: whether their decay warms up, and how much of them is still initial.

Manifests hold both since there is a warm-up. Of an earlier one that training wrote the decay was constant, so the share
follows from the decay and the number of updates; of converted weights it is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megapromoe.config.average_decay import constant_share, decay_at
from megapromoe.config.options import TrainConfig

WARN_ABOVE = 0.05
_OF_TRAINING = ("run", "branch", "recent_norms")  # a manifest without any of these is of converted weights


@dataclass(frozen=True)
class Average:
    """The averaged weights of a checkpoint.

    Attributes:
        warmup: whether the decay of the first updates is smaller; None: not decided, the next start decides.
        initial_share: of the weights that the run began with in the average, in [0, 1]; None: unknown.
        updates: optimizer steps that were applied.
        decay: of the latest updates; None: unknown.
    """

    warmup: bool | None
    initial_share: float | None
    updates: int
    decay: float | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Average:
        """The average that a checked manifest describes."""
        train = manifest.get("config", {}).get("train", {})
        decay = train.get("ema") if type(train.get("ema")) in (int, float) else None
        updates = int(manifest.get("updates", 0))
        if "ema_initial_share" in manifest or "ema_warmup" in manifest:
            return cls(manifest.get("ema_warmup"), manifest.get("ema_initial_share"), updates, decay)
        if not any(key in manifest for key in _OF_TRAINING):
            return cls(None, None, updates, decay)
        share = None if decay is None or not 0 <= decay < 1 else constant_share(decay, updates)
        return cls(False, share, updates, decay)

    def after_update(self, decay: float) -> Average:
        """After one more update, whose decay is `decay` or, with warm-up, `decay_at`."""
        updates, share = self.updates + 1, self.initial_share
        if share is not None:
            share *= decay_at(updates, decay, bool(self.warmup))
        return Average(self.warmup, share, updates, decay)

    @property
    def has_initial_weights(self) -> bool:
        """Whether more than `WARN_ABOVE` of the average are initial weights, as far as is known, after updates."""
        return self.updates > 0 and self.initial_share is not None and self.initial_share > WARN_ABOVE

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        facts: dict[str, Any] = {"ema_initial_share": self.initial_share}
        return facts if self.warmup is None else facts | {"ema_warmup": self.warmup}

    def in_words(self) -> str:
        """Such as "97.5% of them still the initial weights"."""
        return share_in_words(self.initial_share)

    def warning(self, weights: str) -> str:
        """Why `weights` should not be used, with the remedy; "" where nothing speaks against them."""
        if weights != "ema" or not self.has_initial_weights:
            return ""
        decay = "" if self.decay is None else f"train.ema = {self.decay:g}, "
        return (
            f"{self.initial_share:.1%} of the averaged weights are still the initial ones"
            f" ({decay}{self.updates} updates): use the weights as trained (--weights master; in a study's recipe"
            " `weights: master`), train longer, or start a new run with train.ema_warmup=true or a lower train.ema"
        )


def begin(average: Average | None, train: TrainConfig) -> Average:
    """The average with which a start goes on: that of its checkpoint, or a new one; its warm-up is decided."""
    if average is None:
        return Average(train.ema_warmup, 1.0, 0, train.ema)
    if average.warmup is None:
        return Average(train.ema_warmup, average.initial_share, average.updates, average.decay)
    return average


def share_in_words(share: float | None) -> str:
    """A share of the initial weights, as a part of a sentence about averaged weights."""
    if share is None:
        return "an unknown share of them still the initial weights"
    text = "less than 0.1%" if share < 0.001 else f"{share:.1%}"
    return f"{text} of them still the initial weights"
