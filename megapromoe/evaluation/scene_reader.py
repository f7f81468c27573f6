"""Reads scenes: which digits in which colours a picture shows, and where.

Places and number of the digits: the arrangement that explains the picture with the least squared error. An arrangement
is a set of boxes; a box is explained by the nearest of the training digits, everything outside of the boxes by black.
The digit of a box is then classified by a support vector machine, its colour by the mean colour of its ink.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megapromoe.data.scenes.combinations import CANVAS, COLOUR_NAMES, COLOURS, DIGIT
from megapromoe.data.scenes.scenes import LARGEST_PLACE, Box, DigitImages

MAX_ERROR = 0.35  # share of the energy of a box that the nearest digit does not explain; noise has 0.39 and more
MIN_ENERGY = 2.0  # squared brightness of a box; the faintest digit has about 7
BLOCK = 64  # pictures read at once


@dataclass(frozen=True)
class ReadDigit:
    """A digit that a picture shows.

    Attributes:
        digit: 0 to 9; None if what the box shows resembles no digit.
        colour: name of the nearest colour.
        box: its place.
    """

    digit: int | None
    colour: str
    box: Box


class SceneReader:
    """Reads pictures by the digits of the training split; needs no files, and gives the same result every time."""

    def __init__(self) -> None:
        digits = DigitImages("train")
        self._templates = digits.images.reshape(len(digits.images), -1)
        self._labels = digits.labels
        self._arrangements = arrangements()

    @cached_property
    def _classifier(self):
        from sklearn.svm import SVC  # slow to import

        return SVC(gamma=0.001, C=10).fit(self._templates * 16, self._labels)

    def read(self, images_BHWC: np.ndarray) -> list[tuple[ReadDigit, ...]]:
        """The digits of each picture, uint8 (B, CANVAS, CANVAS, 3), by rows and columns.

        Raises ValueError for pictures of another shape or type.
        """
        if images_BHWC.shape[1:] != (CANVAS, CANVAS, 3) or images_BHWC.dtype != np.uint8:
            raise ValueError(
                f"pictures {images_BHWC.dtype} {images_BHWC.shape[1:]} are not scenes: uint8 ({CANVAS}, {CANVAS}, 3)"
            )
        blocks = (images_BHWC[start : start + BLOCK] for start in range(0, len(images_BHWC), BLOCK))
        return [digits for block in blocks for digits in self._read(block.astype(np.float32) / 255)]

    def _read(self, images_BHWC: np.ndarray) -> list[tuple[ReadDigit, ...]]:
        brightness_BHW = images_BHWC.max(axis=3)
        windows_BP = _windows(brightness_BHW)
        energy_BP = np.square(windows_BP).sum(axis=2)
        error_BP = self._nearest_error(windows_BP)
        gain_BP = energy_BP - error_BP  # squared error that a digit in this place saves
        gains_BA = np.stack([gain_BP[:, list(places)].sum(axis=1) for places in self._arrangements], axis=1)
        results = []
        for b, best in enumerate(gains_BA.argmax(axis=1)):
            places = [p for p in self._arrangements[best] if energy_BP[b, p] >= MIN_ENERGY]
            results.append(tuple(self._digit(images_BHWC[b], p, error_BP[b, p] / energy_BP[b, p]) for p in places))
        return results

    def _nearest_error(self, windows_BPX: np.ndarray) -> np.ndarray:
        """Squared distance (B, P) of each window to the nearest training digit, of the brightness that fits best."""
        flat = windows_BPX.reshape(-1, windows_BPX.shape[2])
        energy = np.square(flat).sum(axis=1)
        norms = np.square(self._templates).sum(axis=1)
        dots = flat @ self._templates.T
        # min over s of |x - s t|^2 is |x|^2 - (x.t)^2 / |t|^2; s between 0.5 and 1.2 excludes faint traces.
        scale = np.clip(dots / norms, 0.5, 1.2)
        errors = energy[:, None] - 2 * scale * dots + np.square(scale) * norms
        return errors.min(axis=1).reshape(windows_BPX.shape[:2])

    def _digit(self, image_HWC: np.ndarray, place: int, error: float) -> ReadDigit:
        top, left = divmod(place, LARGEST_PLACE + 1)
        crop = image_HWC[top : top + DIGIT, left : left + DIGIT]
        brightness = crop.max(axis=2)
        digit = int(self._classifier.predict(brightness.reshape(1, -1) / max(brightness.max(), 1e-6) * 16)[0])
        mean = (crop * brightness[:, :, None]).sum(axis=(0, 1))
        mean /= max(mean.max(), 1e-6)
        distances = [np.square(mean - np.array(COLOURS[name])).sum() for name in COLOUR_NAMES]
        return ReadDigit(digit if error <= MAX_ERROR else None, COLOUR_NAMES[int(np.argmin(distances))], (top, left))


def _windows(images_BHW: np.ndarray) -> np.ndarray:
    """The DIGIT x DIGIT window of every place (B, places, DIGIT * DIGIT)."""
    windows = np.lib.stride_tricks.sliding_window_view(images_BHW, (DIGIT, DIGIT), axis=(1, 2))
    return windows.reshape(len(images_BHW), (LARGEST_PLACE + 1) ** 2, DIGIT * DIGIT)


def arrangements() -> list[tuple[int, ...]]:
    """Sets of at most four boxes without overlap, in rows or columns as in scenes, but at any pixel: places of each."""
    side, ends = range(LARGEST_PLACE + 1), (0, LARGEST_PLACE)
    boxes_of_all: list[list[Box]] = [[]]
    boxes_of_all += [[(row, column)] for row in side for column in side]
    for transposed in (False, True):
        rows: list[list[Box]] = []
        rows += [[(0, a), (DIGIT, b)] for a in side for b in side]
        rows += [[(0, a), *((DIGIT, b) for b in ends)] for a in side]
        rows += [[*((0, a) for a in ends), (DIGIT, b)] for b in side]
        rows += [[*((0, a) for a in ends), *((DIGIT, b) for b in ends)]]
        boxes_of_all += [[(b, a) for a, b in boxes] if transposed else boxes for boxes in rows]
    places = (tuple(sorted(row * (LARGEST_PLACE + 1) + column for row, column in boxes)) for boxes in boxes_of_all)
    return list(dict.fromkeys(places))
