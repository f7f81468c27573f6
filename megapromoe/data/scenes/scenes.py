"""Scenes made from scikit-learn's handwritten digits: each is determined by (seed, split, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megapromoe.data.datasets import ArrayDataset, DatasetError
from megapromoe.data.digits_file import read_digits
from megapromoe.data.scenes.combinations import (
    CANVAS,
    COLOUR_NAMES,
    COLOURS,
    DIGIT,
    MAX_DIGITS,
    Description,
    Group,
    held_out_parts,
)
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.wording import caption, states

SPLITS = ("train", "test")
TEST_EVERY = 6  # every sixth image of the digits is of the test split: 300 of 1,797
KINDS = ("one", "one", "equal", "two", "more")  # of scenes, equally often: a single digit is the easiest to learn
DIMMEST = 80  # percent: the brightness of a digit is between this and 100
LARGEST_PLACE = CANVAS - DIGIT
PLACES = range(0, LARGEST_PLACE + 1, DIGIT // 2)  # rows and columns at which a digit may start: edges of patches of 4

Box = tuple[int, int]
"""Row and column of the upper left corner of a digit."""


@dataclass(frozen=True)
class DigitScene:
    """A picture of digits, and its descriptions.

    Attributes:
        pixels: uint8 (CANVAS, CANVAS, 3), black background.
        shown: what the picture shows: groups with colours, and all relations that hold.
        boxes: of each group, the place of each of its digits.
        stated: what the caption states.
        caption: in words.
    """

    pixels: np.ndarray
    shown: Description
    boxes: tuple[tuple[Box, ...], ...]
    stated: Description
    caption: str

    def to_dict(self) -> dict[str, Any]:
        """Caption, descriptions and places, as JSON can represent them."""
        return {
            "caption": self.caption,
            "shown": asdict(self.shown),
            "stated": asdict(self.stated),
            "boxes": [[list(box) for box in boxes] for boxes in self.boxes],
        }


class DigitImages:
    """The digits of one split by class. Images of the test split are in no scene of the training split.

    Args:
        split: "train" or "test".
    """

    def __init__(self, split: str):
        images, labels = read_digits()
        is_test = np.arange(len(images)) % TEST_EVERY == 0
        chosen = is_test if split == "test" else ~is_test
        self.images = (images[chosen] / 16).astype(np.float32)
        """(N, DIGIT, DIGIT) in [0, 1]"""
        self.labels = labels[chosen]
        self.of_digit = [self.images[self.labels == digit] for digit in range(10)]


class Scenes(ArrayDataset):
    """Scenes as a data set: 3 x 16 x 16 in [-1, 1], of one class, each with a caption.

    Scenes of the training split show no held-out combination and no image of the test split; those of the test split
    are drawn from all combinations and from the images of the test split.

    Args:
        size: number of scenes.
        seed: of all choices.
        split: "train" or "test".

    Raises DatasetError for another split.
    """

    shape = (3, CANVAS, CANVAS)
    num_classes = 1
    class_names = ("scene",)

    def __init__(self, size: int, seed: int = 0, split: str = "train"):
        if split not in SPLITS:
            raise DatasetError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        self.seed, self.split = seed, split
        self.labels = np.zeros(size, dtype=np.int64)
        self.digits = DigitImages(split)

    def __len__(self) -> int:
        return len(self.labels)

    def scene_at(self, index: int) -> DigitScene:
        """Scene number `index`, with its caption."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        draws = Draws(self.seed, f"scene, {self.split}", index)
        while True:
            groups = _groups(draws)
            boxes = arrange(groups, draws)
            shown = Description(groups, relations_of(boxes))
            if self.split != "train" or not held_out_parts(shown):
                break
        stated = states(shown, draws)
        words = caption(stated, draws)
        return DigitScene(paint(groups, boxes, self.digits, draws), shown, boxes, stated, words)

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, 3, CANVAS, CANVAS) float32 in [-1, 1] and labels (B), all 0."""
        pixels = np.stack([self.scene_at(int(index)).pixels for index in indices_B])
        return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, self.labels[indices_B]


def paint(groups: Sequence[Group], boxes: Sequence[Sequence[Box]], digits: DigitImages, draws: Draws) -> np.ndarray:
    """A picture with randomly chosen images of the digits: uint8 (CANVAS, CANVAS, 3)."""
    canvas = np.zeros((CANVAS, CANVAS, 3), dtype=np.float32)
    for group, places in zip(groups, boxes, strict=True):
        assert group.colour is not None
        for top, left in places:
            image = draws.one_of(digits.of_digit[group.digit])
            brightness = (DIMMEST + draws.below(101 - DIMMEST)) / 100
            coloured = image[:, :, None] * np.array(COLOURS[group.colour], dtype=np.float32) * brightness
            canvas[top : top + DIGIT, left : left + DIGIT] = coloured
    return (canvas * 255).round().astype(np.uint8)


def arrange(groups: Sequence[Group], draws: Draws) -> tuple[tuple[Box, ...], ...]:
    """Random places of `PLACES` without overlap for the digits of each group.

    One digit is anywhere. Several are in two rows, or in two columns; a row with one digit has it anywhere.
    """
    count = sum(group.count for group in groups)
    if count == 1:
        boxes = [(draws.one_of(PLACES), draws.one_of(PLACES))]
    else:
        in_first = 1 if count == 2 else 2 if count == MAX_DIGITS else 1 + draws.below(2)
        boxes = [(0, place) for place in _places(in_first, draws)]
        boxes += [(DIGIT, place) for place in _places(count - in_first, draws)]
        if draws.happens(50):
            boxes = [(left, top) for top, left in boxes]
    boxes = draws.shuffled(boxes)
    ends = np.cumsum([group.count for group in groups])
    return tuple(tuple(sorted(boxes[end - group.count : end])) for group, end in zip(groups, ends, strict=True))


def _places(count: int, draws: Draws) -> list[int]:
    """Where the digits of a row start: two fill it, one is anywhere."""
    return [0, DIGIT] if count == 2 else [draws.one_of(PLACES)]


def relations_of(boxes: Sequence[Sequence[Box]]) -> tuple[str, ...]:
    """The relations that hold between the first group of boxes and the second: no row, or no column, is common."""
    if len(boxes) < 2:
        return ()
    first, second = (np.array(places) for places in boxes)
    relations = []
    for axis, (before, after) in enumerate((("above", "below"), ("left of", "right of"))):
        if first[:, axis].max() + DIGIT <= second[:, axis].min():
            relations.append(before)
        elif second[:, axis].max() + DIGIT <= first[:, axis].min():
            relations.append(after)
    return tuple(relations)


def _groups(draws: Draws) -> tuple[Group, ...]:
    """Random groups: a digit (40 %); two to four equal ones, two digits, or three or four in two groups (20 % each)."""
    kind = draws.one_of(KINDS)
    if kind in ("one", "equal"):
        count = 1 if kind == "one" else 2 + draws.below(MAX_DIGITS - 1)
        return (Group(count, draws.below(10), draws.one_of(COLOUR_NAMES)),)
    first = 1 if kind == "two" else 1 + draws.below(MAX_DIGITS - 1)
    second = 1 if kind == "two" else 1 + draws.below(MAX_DIGITS - first)
    if kind == "more" and first == second == 1:
        second = 2
    while True:
        groups = tuple(Group(n, draws.below(10), draws.one_of(COLOUR_NAMES)) for n in (first, second))
        if groups[0].digit != groups[1].digit or groups[0].colour != groups[1].colour:
            return groups
