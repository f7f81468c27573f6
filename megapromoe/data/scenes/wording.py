"""Captions of scenes in varied English words."""

from __future__ import annotations

from megapromoe.data.scenes.combinations import Description, Group
from megapromoe.data.scenes.draws import Draws

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
PREFIXES = ("", "", "a picture of ", "an image of ", "a drawing of ", "a scene with ")
WORDS = {
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
}
SEPARATORS = (" and ", " and ", " with ", " together with ")
UNNAMED_COLOURS, NUMERALS, TRAILING_COLOURS, SENTENCES = 25, 15, 20, 20  # percent of the captions


def caption(stated: Description, draws: Draws) -> str:
    """A caption that states exactly a description: colours and at most one relation, if the description has them."""
    numerals, trailing = draws.happens(NUMERALS), draws.happens(TRAILING_COLOURS)
    if draws.happens(50):
        stated = stated.swapped()
    separator = draws.one_of(SEPARATORS)
    if stated.relations:
        separator = f" {draws.one_of(WORDS[stated.relations[0]])} "
    text = separator.join(_phrase(group, numerals, trailing) for group in stated.groups)
    if draws.happens(SENTENCES):
        return f"there {'are' if stated.groups[0].count > 1 else 'is'} {text}"
    return draws.one_of(PREFIXES) + text


def prompt(stated: Description) -> str:
    """The plain caption of a description: "a picture of two red threes above a blue seven"."""
    separator = f" {WORDS[stated.relations[0]][0]} " if stated.relations else " and "
    return "a picture of " + separator.join(_phrase(g, numerals=False, trailing=False) for g in stated.groups)


def states(shown: Description, draws: Draws) -> Description:
    """What a caption is to state about a scene: its groups; mostly their colours; of its relations none or one."""
    groups = shown.groups
    same_digit = len({group.digit for group in groups}) < len(groups)
    if not same_digit and draws.happens(UNNAMED_COLOURS):
        groups = tuple(Group(group.count, group.digit) for group in groups)
    relation = draws.one_of((None, *shown.relations))
    return Description(groups, () if relation is None else (relation,))


def _phrase(group: Group, numerals: bool, trailing: bool) -> str:
    """A group in words: "a red three", "two threes in red", "an 8"."""
    noun = str(group.digit) if numerals else DIGIT_WORDS[group.digit]
    if group.count > 1:
        noun += "es" if noun == "six" else "s"
    words = noun if group.colour is None or trailing else f"{group.colour} {noun}"
    article = COUNT_WORDS[group.count] if group.count > 1 else "an" if words.startswith(("eight", "8")) else "a"
    return f"{article} {words} in {group.colour}" if group.colour and trailing else f"{article} {words}"
