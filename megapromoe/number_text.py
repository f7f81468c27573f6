"""Numbers as text: significant digits, durations, and parts of a total."""

from __future__ import annotations

import math


def significant(value: float, digits: int = 3) -> str:
    """A number with at least `digits` significant digits and no exponent: 4,321, 43.2, 0.317."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    # If rounding carries (9.999 -> 10.00), drop one digit.
    return (
        text
        if decimals == 0 or abs(float(text.replace(",", ""))) < 10 ** (digits - decimals)
        else text[:-1].rstrip(".")
    )


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def share_of(part: float, total: int) -> str:
    """A part of a total: "17 of 96"."""
    return f"{part:,.0f} of {total:,}"
