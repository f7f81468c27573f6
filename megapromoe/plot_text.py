"""Text from users in plots, such as names of classes, files and models: drawn literally, not as markup."""

from __future__ import annotations

from functools import cache


def literal(name: str) -> str:
    """Escapes a name for matplotlib, which would parse `$` as mathematics and leave `_name` out of a legend.

    Also for a part of a text. Characters that the font does not have are escaped, see `legible`.
    """
    text = legible(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legible(name: str) -> str:
    """A name in which control characters and those that matplotlib's default font does not have are \\uXXXX."""
    return "".join(c if c.isprintable() and ord(c) in _characters() else _escaped(c) for c in name)


def font_file() -> str:
    """The path of matplotlib's default font: DejaVu Sans, or `font.family` of the user's matplotlibrc."""
    from matplotlib.font_manager import FontProperties, findfont  # slow to import

    return findfont(FontProperties())


@cache
def _characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
