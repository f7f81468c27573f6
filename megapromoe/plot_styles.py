"""Styles of lines, markers and bars. All plots take them from here, so that no two lines of a plot look the same.

The colours are those of Okabe and Ito without yellow: readers with colour blindness can distinguish them on white.
Since there are only six, a style is a triple of colour, line style and marker. In every plot the baseline, and only the
baseline, is black.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

BASELINE_COLOUR = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>"
HATCHES = ("", "//", "..", "xx")
# Paul Tol's "muted", for the parts of stacked bars: neighbours differ in lightness too.
_NINE = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
STACKED = (*_NINE, "#DDDDDD")

# For areas, which have neither lines nor markers: the six, and six more that differ in lightness or hue.
AREAS = (*COLOURS, "#332288", "#DDCC77", "#882255", "#117733", "#88CCEE", "#661100")

MEMBERS = len(LINES) * len(MARKERS)  # pairs of line style and marker for each colour
DISTINCT = len(COLOURS) * MEMBERS  # triples; with more keys in a plot, the styles repeat

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Style:
    """Colour, line style and marker of a variant, the same in every panel of a plot."""

    colour: str
    line: str
    marker: str

    @property
    def is_baseline(self) -> bool:
        """Whether this is the style of the baseline."""
        return self.colour == BASELINE_COLOUR

    @property
    def of_line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`; the caller adds `markevery` for curves of many points."""
        width = 2.0 if self.is_baseline else 1.3
        return {**self.of_marks, "linestyle": self.line, "linewidth": width, "markersize": 4}

    @property
    def of_marks(self) -> dict[str, Any]:
        """Keyword arguments for markers without a line."""
        return {"color": self.colour, "marker": self.marker}


def assign(keys: Sequence[Key], baseline: Key | None = None) -> dict[Key, Style]:
    """A style for each key, all different up to `DISTINCT` keys. `baseline` is black and solid at any position."""
    others = [key for key in keys if key != baseline]
    styles = {key: _numbered(number) for number, key in enumerate(others)}
    return {key: _baseline(0) if key == baseline else styles[key] for key in keys}


def assign_families(keys: Sequence[tuple[str, Key]], baseline: str | None = None) -> dict[tuple[str, Key], Style]:
    """Like `assign`, for keys (family, member), such as variants with several settings each.

    Each family gets a colour, and its members differ in line style and marker. If there are too few colours or markers
    for that, or only one family or one member each, styles are assigned as by `assign`. The baseline's members are
    black.
    """
    members: dict[str, list[Key]] = {}
    for family, member in keys:
        members.setdefault(family, []).append(member)
    others = [family for family in members if family != baseline]
    plain = len(others) < 2 or all(len(members[family]) == 1 for family in others)
    if plain or len(others) > len(COLOURS) or max(map(len, members.values())) > MEMBERS:
        styles = assign([key for key in keys if key[0] != baseline])
    else:
        styles = {
            (family, member): Style(COLOURS[number], *_pair(place))
            for number, family in enumerate(others)
            for place, member in enumerate(members[family])
        }
    black = {
        (family, member): _baseline(members[family].index(member)) for family, member in keys if family == baseline
    }
    return {key: black.get(key) or styles[key] for key in keys}


def area_colours(count: int) -> list[tuple[float, float, float]]:
    """`count` different colours of areas, (red, green, blue) in [0, 1]: 12, the same paler, above 24 a colour map."""
    if count > 2 * len(AREAS):
        from matplotlib import colormaps  # slow to import

        return [tuple(colour[:3]) for colour in colormaps["turbo"]([i / (count - 1) for i in range(count)])]
    colours = []
    for i in range(count):
        text = AREAS[i % len(AREAS)]
        channels = [int(text[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (1 - (1 - c) * 0.45 if i >= len(AREAS) else c for c in channels)
        colours.append((red, green, blue))
    return colours


def _numbered(number: int) -> Style:
    """The style of a number. Colours change fastest, then line styles; the marker changes with each number."""
    pairs = len(COLOURS) * len(LINES)
    marker = (number % pairs + number // pairs) % len(MARKERS)
    return Style(COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)], MARKERS[marker])


def _pair(place: int) -> tuple[str, str]:
    """A line style and a marker, different for 40 places. The shift by `place // 20` reaches all pairs."""
    return LINES[place % len(LINES)], MARKERS[(place + place // 20) % len(MARKERS)]


def _baseline(place: int) -> Style:
    return Style(BASELINE_COLOUR, *_pair(place))
