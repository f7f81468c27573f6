"""The scenes behind the records of a folder of latents: where each digit is, and what the caption states about it."""

from __future__ import annotations

import numpy as np

from megapromoe.data.datasets import DatasetError
from megapromoe.data.latents import Latents, Manifest
from megapromoe.data.scenes.combinations import DIGIT
from megapromoe.data.scenes.scenes import SPLITS, DigitScene, Scenes

NO_GROUP = -1  # a token that shows no digit


def holds_scenes(manifest: Manifest) -> bool:
    """Whether the records of latents are scenes, as `megapromoe encode --scenes` writes them."""
    return tuple(manifest.shape) == Scenes.shape and tuple(manifest.class_names) == Scenes.class_names


def recorded_scenes(data: Latents, indices_N: np.ndarray) -> list[DigitScene]:
    """The scenes of records, made again from the names of the records.

    Raises DatasetError for a record that is not a scene.
    """
    places = []
    for record in indices_N.tolist():
        name = data.name(record)
        parts = name.split("/")
        if len(parts) != 3 or parts[0] not in SPLITS or not (parts[1].isdigit() and parts[2].isdigit()):
            raise DatasetError(f"{data.folder}, record {record} ({name}): is not a scene; encode again with --scenes")
        places.append((parts[0], int(parts[1]), int(parts[2])))
    size = 1 + max((index for _, _, index in places), default=0)
    splits = {key: Scenes(size, key[1], key[0]) for key in {place[:2] for place in places}}
    return [splits[split, seed].scene_at(index) for split, seed, index in places]


def group_of_tokens(digit_scene: DigitScene, side: int) -> np.ndarray:
    """The group of digits, 0 or 1, that each token shows; `NO_GROUP` for one without ink: int64 (side · side,).

    A token whose patch has ink of two groups shows the one with more pixels of it.

    Args:
        side: tokens per side of a scene.
    """
    has_ink = digit_scene.pixels.max(axis=2) > 0
    patch = len(has_ink) // side
    ink_GS = np.zeros((len(digit_scene.boxes), side * side), dtype=np.int64)
    for group, boxes in enumerate(digit_scene.boxes):
        in_group = np.zeros_like(has_ink)
        for top, left in boxes:
            in_group[top : top + DIGIT, left : left + DIGIT] = True
        ink_GS[group] = ink_of_tokens(has_ink & in_group, patch)
    return np.where(ink_GS.any(axis=0), ink_GS.argmax(axis=0), NO_GROUP)


def ink_of_tokens(has_ink: np.ndarray, patch: int) -> np.ndarray:
    """The number of pixels with ink of each patch, int64 (S,)."""
    side = len(has_ink) // patch
    return has_ink.reshape(side, patch, side, patch).sum(axis=(1, 3)).flatten()
