"""Names that come from users in pictures and plots: of classes, files, models. They are drawn as they are written."""

from __future__ import annotations

from functools import cache


def literal(name: str) -> str:
    """A name as text for matplotlib, which would take `$` for mathematics and leave `_name` out of a legend.

    For a part of a text, too. Characters that the font lacks are escaped, see `legible`.
    """
    text = legible(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legible(name: str) -> str:
    """A name in characters that matplotlib's default font has; others, and control characters, as \\uXXXX."""
    return "".join(c if c.isprintable() and ord(c) in _characters() else _escaped(c) for c in name)


def font_file() -> str:
    """The file of matplotlib's default font: DejaVu Sans, or the `font.family` of the user's matplotlibrc."""
    from matplotlib.font_manager import FontProperties, findfont  # slow to import

    return findfont(FontProperties())


@cache
def _characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
