"""Which weights of a checkpoint to use: `master`, `ema` or `ema=DECAY`, and the kinds of tensors that hold averages.

A run can average its weights with several decays at once (`train.ema_decay`). A checkpoint holds the average of the
first decay as the kind `ema`, as if it were the only one, and every other one as `ema=DECAY`, such as `ema=0.999`. The
names of the kinds are also what the user gives as `--weights`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megapromoe.errors import UserError

MASTER, AVERAGE = "master", "ema"
_PREFIX = "ema="


class UnknownWeights(UserError):
    """A choice of weights that is not valid, or that a checkpoint does not have."""

    on_all_ranks = True


def average_kind(decay: float) -> str:
    """The kind of the average of a decay that is not the first one of its run; also its name for `--weights`."""
    return f"{_PREFIX}{decay!r}"


def average_kinds(decays: Sequence[float | None]) -> tuple[str, ...]:
    """The kinds of the averages of these decays. The first is `ema`, whatever its decay.

    Args:
        decays: different numbers; a single one may be None, for an unknown decay.
    """
    further = (average_kind(decay) for decay in decays[1:] if decay is not None)
    return (AVERAGE, *further) if decays else ()


def is_average(weights: str) -> bool:
    """Whether a choice of weights is of averaged ones."""
    return weights == AVERAGE or weights.startswith(_PREFIX)


def read_weights_choice(text: str) -> str:
    """The choice of weights that a user wrote, with the decay in its usual spelling. Raises UnknownWeights."""
    if text in (MASTER, AVERAGE):
        return text
    try:
        decay = float(text.removeprefix(_PREFIX)) if text.startswith(_PREFIX) else -1.0
    except ValueError:
        decay = -1.0
    if not 0 <= decay < 1:
        raise UnknownWeights(
            f"weights = {text!r}: must be ema or master, or ema=DECAY for one of several averages, such as ema=0.999"
        )
    return average_kind(decay)


def kind_of(weights: str, decays: Sequence[float | None], where: object) -> str:
    """The kind of tensors that holds the chosen weights.

    Args:
        weights: `master`, `ema` or `ema=DECAY`.
        decays: those of the averages of a checkpoint, the first of which is stored as `ema`; None: unknown.
        where: the checkpoint, for the message.

    Raises UnknownWeights, which lists the decays, if the checkpoint has no average of that decay.
    """
    weights = read_weights_choice(weights)
    if not weights.startswith(_PREFIX):
        return weights
    for kind, decay in zip(average_kinds(decays), decays, strict=True):
        if decay is not None and average_kind(decay) == weights:
            return kind
    raise UnknownWeights(
        f"weights = {weights}: {where} has no average of that decay, only {_in_words(decays)}; use one of these"
    )


def _in_words(decays: Iterable[float | None]) -> str:
    return ", ".join("ema (of an unknown decay)" if decay is None else average_kind(decay) for decay in decays)
