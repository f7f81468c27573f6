"""Many comparisons at once: p-values adjusted by Holm's method, and a warning where only plain intervals exclude zero.

Of m intervals of 95 %, one in twenty excludes zero by chance. Holm (1979) adjusts the p-values of all m: if those with
an adjusted p-value below 5 % are taken as differences, the probability of one or more false ones is at most 5 %,
whatever the dependence between them. (scipy has no function for it; it is three lines.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megapromoe.studies.fit import LEVEL

ALPHA = 1 - LEVEL


def holm(p_values: Sequence[float]) -> list[float]:
    """The adjusted p-values, in the order of the plain ones."""
    p_N = np.asarray(p_values, dtype=float)
    order_N = np.argsort(p_N, kind="stable")
    adjusted_N = np.empty_like(p_N)
    # The smallest is multiplied by m, the next by m - 1, ...; none becomes smaller than the one before it.
    adjusted_N[order_N] = np.maximum.accumulate(p_N[order_N] * np.arange(len(p_N), 0, -1))
    return [float(p) for p in np.minimum(adjusted_N, 1.0)]


def adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """As `holm`, for comparisons of which some have no p-value, because they have one seed."""
    known = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(known) for p in p_values]


def count_in_words(p_values: Sequence[float | None]) -> str:
    """How many intervals there are, what chance alone makes of them, and what is left after the adjustment."""
    known = [p for p in p_values if p is not None]
    if not known:
        return ""
    count, plain, left = len(known), sum(p < ALPHA for p in known), sum(p < ALPHA for p in holm(known))
    if count == 1:
        return "There is one interval; without an effect, it excludes zero in 5 % of studies."
    return (
        f"Of {count} intervals, those that exclude zero: {plain}. Without any effect, {ALPHA * count:.2g} would on"
        f" average, and at least one in {1 - LEVEL**count:.0%} of studies if they were independent. Adjusted by Holm's"
        f" method for all {count}: {left}."
    )


def warning(names: Sequence[str], p_values: Sequence[float | None]) -> str:
    """A sentence that names the comparisons whose plain interval alone excludes zero; "" if there are none."""
    pairs = zip(names, p_values, adjusted(p_values), strict=True)
    plain_only = [name for name, p, q in pairs if p is not None and q is not None and p < ALPHA <= q]
    if not plain_only:
        return ""
    plain = sum(p is not None and p < ALPHA for p in p_values)
    shown = ", ".join(plain_only[:6]) + (f" and {len(plain_only) - 6} more" if len(plain_only) > 6 else "")
    return (
        f"**Warning: {plain} of {sum(p is not None for p in p_values)} intervals exclude zero, but after Holm's"
        f" adjustment {plain - len(plain_only)}.** Those of {shown} may be chance: confirm them with new seeds."
    )


def p_in_words(p: float | None) -> str:
    """A p-value for a table."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
