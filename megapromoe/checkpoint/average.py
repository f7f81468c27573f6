"""The state of the averaged weights (EMA) in a checkpoint: their decays, the warm-up, and how much is still initial.

Manifests contain the warm-up and the initial share since the decay has a warm-up. A training run of an earlier version
used a constant decay, so the initial share follows from the decay and the number of updates. For converted weights it
is unknown. If a run has several averages, or one that began after the first step, the manifest also contains
`ema_averages`, an entry for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megapromoe.checkpoint.weights import MASTER, average_kinds, is_average
from megapromoe.config.average_decay import constant_share, decay_at
from megapromoe.config.train_options import TrainConfig

WARN_ABOVE = 0.05
_TRAINING_KEYS = ("run", "branch", "recent_norms")  # the manifest of converted weights has none of these


@dataclass(frozen=True)
class Average:
    """One average of the weights in a checkpoint.

    Attributes:
        warmup: whether the decay starts small and grows; None: not decided yet, the next start decides.
        initial_share: share of the initial weights in the average, in [0, 1]; None: unknown. The initial weights of an
            average that was added to a run are those of the step at which it was added.
        updates: number of applied optimizer steps that it contains.
        decay: decay of the latest updates; None: unknown.
    """

    warmup: bool | None
    initial_share: float | None
    updates: int
    decay: float | None = None

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
        """The manifest entries of this state, if it is the only average of its run."""
        metadata: dict[str, Any] = {"ema_initial_share": self.initial_share}
        return metadata if self.warmup is None else metadata | {"ema_warmup": self.warmup}

    def in_words(self) -> str:
        """The initial share as a phrase, such as "97.5% of them still the initial weights"."""
        return share_in_words(self.initial_share)

    def warning(self, weights: str) -> str:
        """Why `weights` ("master", or this average) should not be used, with the remedy; "" if they can be used."""
        if not is_average(weights) or not self.has_initial_weights:
            return ""
        decay = "" if self.decay is None else f"train.ema_decay = {self.decay:g}, "
        return (
            f"{self.initial_share:.1%} of the averaged weights are still the initial ones"
            f" ({decay}{self.updates} updates): use the weights as trained (--weights master; in a study's recipe"
            " `weights: master`), train longer, or start a new run with train.ema_warmup=true or a lower"
            " train.ema_decay"
        )


# ---- in manifests


def averages_of(manifest: Mapping[str, Any]) -> tuple[Average, ...]:
    """All averages in a manifest that `read_manifest` has checked; the first is stored as the kind `ema`."""
    decays = _decays(manifest.get("config", {}).get("train", {}))
    decay = decays[0] if decays else None
    updates = int(manifest.get("updates", 0))
    if entries := manifest.get("ema_averages"):
        warmup = manifest.get("ema_warmup")
        return tuple(Average(warmup, e.get("initial_share"), int(e["updates"]), float(e["decay"])) for e in entries)
    if "ema_initial_share" in manifest or "ema_warmup" in manifest:
        return (Average(manifest.get("ema_warmup"), manifest.get("ema_initial_share"), updates, decay),)
    if not any(key in manifest for key in _TRAINING_KEYS):
        return (Average(None, None, updates, decay),)
    share = None if decay is None or not 0 <= decay < 1 else constant_share(decay, updates)
    return (Average(False, share, updates, decay),)


def average_metadata(averages: Sequence[Average], updates: int) -> dict[str, Any]:
    """The manifest entries of all averages of a run.

    A single average with all updates of the run needs no entry `ema_averages`: then the manifest is that of versions
    that had one decay only.

    Args:
        updates: the entry `updates` of the same manifest.
    """
    metadata = averages[0].metadata()
    if len(averages) == 1 and averages[0].updates == updates:
        return metadata
    entries = [{"decay": a.decay, "initial_share": a.initial_share, "updates": a.updates} for a in averages]
    return metadata | {"ema_averages": entries}


def kinds_of_averages(manifest: Mapping[str, Any]) -> dict[str, Average]:
    """The kind of tensors of each average in a manifest -> its state; the first is `ema`."""
    averages = averages_of(manifest)
    return dict(zip(average_kinds([average.decay for average in averages]), averages, strict=True))


def _decays(train: Mapping[str, Any]) -> list[float]:
    """The decays in the `train` section of a manifest's config; empty if there are none."""
    value = train.get("ema_decay")
    values: list[Any] = value if isinstance(value, list) else [value]
    return [float(decay) for decay in values] if all(type(decay) in (int, float) for decay in values) else []


# ---- at the start of training


@dataclass(frozen=True)
class AverageStart:
    """Where an average begins at a start.

    Attributes:
        source: the kind of tensors of the checkpoint with which it begins: its own or, for a decay that was added to
            the run, `master`, the current weights.
        average: its state.
    """

    source: str
    average: Average


def averages_at_start(saved: Sequence[Average], train: TrainConfig) -> list[AverageStart]:
    """Where the averages of `train.ema_decay` begin, in its order.

    A decay that the checkpoint has too continues its average. The other averages of the checkpoint continue, in their
    order, with the other decays of the start, because the decay of an average may change during a run. If there are
    more decays than averages, the last ones begin at the current weights. If there are fewer, the last averages end:
    see `ended_averages`.

    Args:
        saved: the averages of the checkpoint, see `averages_of`; empty for a new run.
    """
    warmup = saved[0].warmup if saved and saved[0].warmup is not None else train.ema_warmup
    kinds = average_kinds([average.decay for average in saved]) if saved else ()
    starts = []
    for decay, index in zip(train.ema_decays, _continued(saved, train), strict=True):
        if index is None:
            starts.append(AverageStart(MASTER, Average(warmup, 1.0, 0, decay)))
        else:
            starts.append(AverageStart(kinds[index], replace(saved[index], warmup=warmup)))
    return starts


def ended_averages(saved: Sequence[Average], train: TrainConfig) -> list[Average]:
    """The averages of a checkpoint that no decay of `train.ema_decay` continues."""
    continued = _continued(saved, train)
    return [average for index, average in enumerate(saved) if index not in continued]


def _continued(saved: Sequence[Average], train: TrainConfig) -> list[int | None]:
    """For each decay of the start the index of the saved average that it continues, or None."""
    decays = [average.decay for average in saved]
    indices = [decays.index(decay) if decay in decays else None for decay in train.ema_decays]
    others = iter(index for index in range(len(saved)) if index not in indices)
    return [next(others, None) if index is None else index for index in indices]


def share_in_words(share: float | None) -> str:
    """The share of the initial weights as a phrase for a sentence about averaged weights."""
    if share is None:
        return "an unknown share of them still the initial weights"
    text = "less than 0.1%" if share < 0.001 else f"{share:.1%}"
    return f"{text} of them still the initial weights"
