"""The state of the averaged weights (EMA) in a checkpoint: whether the decay warms up, and how much is still initial.

Manifests contain both values since the decay has a warm-up. A training run of an earlier version used a constant decay,
so the initial share follows from the decay and the number of updates. For converted weights it is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megapromoe.config.average_decay import constant_share, decay_at
from megapromoe.config.options import TrainConfig

WARN_ABOVE = 0.05
_TRAINING_KEYS = ("run", "branch", "recent_norms")  # the manifest of converted weights has none of these


@dataclass(frozen=True)
class Average:
    """The averaged weights of a checkpoint.

    Attributes:
        warmup: whether the decay starts small and grows; None: not decided yet, the next start decides.
        initial_share: share of the initial weights in the average, in [0, 1]; None: unknown.
        updates: number of applied optimizer steps.
        decay: decay of the latest updates; None: unknown.
    """

    warmup: bool | None
    initial_share: float | None
    updates: int
    decay: float | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Average:
        """Reads the state from a manifest that `read_manifest` has checked."""
        train = manifest.get("config", {}).get("train", {})
        decay = train.get("ema") if type(train.get("ema")) in (int, float) else None
        updates = int(manifest.get("updates", 0))
        if "ema_initial_share" in manifest or "ema_warmup" in manifest:
            return cls(manifest.get("ema_warmup"), manifest.get("ema_initial_share"), updates, decay)
        if not any(key in manifest for key in _TRAINING_KEYS):
            return cls(None, None, updates, decay)
        share = None if decay is None or not 0 <= decay < 1 else constant_share(decay, updates)
        return cls(False, share, updates, decay)

    def after_update(self, decay: float) -> Average:
        """Returns the state after one more update, with `decay` or, during warm-up, with `decay_at(...)`."""
        updates, share = self.updates + 1, self.initial_share
        if share is not None:
            share *= decay_at(updates, decay, bool(self.warmup))
        return Average(self.warmup, share, updates, decay)

    @property
    def has_initial_weights(self) -> bool:
        """Whether the initial weights are known to make up more than `WARN_ABOVE` of an average that was updated."""
        return self.updates > 0 and self.initial_share is not None and self.initial_share > WARN_ABOVE

    def metadata(self) -> dict[str, Any]:
        """The manifest entries of this state."""
        metadata: dict[str, Any] = {"ema_initial_share": self.initial_share}
        return metadata if self.warmup is None else metadata | {"ema_warmup": self.warmup}

    def in_words(self) -> str:
        """The initial share as a phrase, such as "97.5% of them still the initial weights"."""
        return share_in_words(self.initial_share)

    def warning(self, weights: str) -> str:
        """Why `weights` ("ema" or "master") should not be used, with the remedy; "" if they can be used."""
        if weights != "ema" or not self.has_initial_weights:
            return ""
        decay = "" if self.decay is None else f"train.ema = {self.decay:g}, "
        return (
            f"{self.initial_share:.1%} of the averaged weights are still the initial ones"
            f" ({decay}{self.updates} updates): use the weights as trained (--weights master; in a study's recipe"
            " `weights: master`), train longer, or start a new run with train.ema_warmup=true or a lower train.ema"
        )


def average_at_start(average: Average | None, train: TrainConfig) -> Average:
    """The average at the start of training: from the checkpoint, or new. `warmup` is decided if it was not yet."""
    if average is None:
        return Average(train.ema_warmup, 1.0, 0, train.ema)
    if average.warmup is None:
        return Average(train.ema_warmup, average.initial_share, average.updates, average.decay)
    return average


def share_in_words(share: float | None) -> str:
    """The share of the initial weights as a phrase for a sentence about averaged weights."""
    if share is None:
        return "an unknown share of them still the initial weights"
    text = "less than 0.1%" if share < 0.001 else f"{share:.1%}"
    return f"{text} of them still the initial weights"
