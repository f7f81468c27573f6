"""Images with captions whose routing is recorded, and what their tokens show where the data have descriptions.

Letters: N images, S tokens of an image, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megapromoe.config.options import Config
from megapromoe.data.caption_batches import Captions, CaptionSource
from megapromoe.data.datasets import Dataset
from megapromoe.data.latents import Latents
from megapromoe.data.scenes.combinations import COLOUR_NAMES
from megapromoe.data.scenes.recorded import group_of_tokens, holds_scenes, recorded_scenes
from megapromoe.data.scenes.scenes import DigitScene
from megapromoe.data.scenes.wording import DIGIT_WORDS
from megapromoe.nn.text_condition import TextCondition
from megapromoe.routing_analysis.measures import NO_EXPERT
from megapromoe.routing_analysis.observe import RoutingError

NO_TOKEN_GROUP = NO_EXPERT  # of a token that is in no group
BACKGROUND, NO_COLOUR = "background", "colour not named"


class TokenGroups(NamedTuple):
    """A division of the image tokens into named groups."""

    kind: str
    """What distinguishes the groups, such as "digit"."""
    names: tuple[str, ...]
    group_NS: np.ndarray
    """The group of each token, int64; -1: in no group."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images with texts.

    Attributes:
        clean_NCHW: scaled images or latents, float32.
        noise_numbers: the number of each image that determines its noise.
        captions: a text of each image.
        condition_of: the texts of a range of images as the model takes them, on the CPU.
        groups: what their tokens show.
    """

    clean_NCHW: np.ndarray
    noise_numbers: list[int]
    captions: tuple[str, ...]
    condition_of: Callable[[slice], TextCondition]
    groups: tuple[TokenGroups, ...] = ()


def images_of_data(config: Config, dataset: Dataset, captions: CaptionSource | None, count: int) -> CaptionedImages:
    """Up to `count` images of the training data with their captions, spread evenly; of scenes also what tokens show.

    Raises RoutingError for random data, which have no words; DatasetError.
    """
    if not isinstance(captions, Captions) or not isinstance(dataset, Latents):
        raise RoutingError(
            f"data.source = {config.data.source!r}: the run was trained on random text features, which have no words;"
            " give a run on captions"
        )
    count = min(count, len(dataset))
    picked_N = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
    clean_NCHW, _ = dataset.read(picked_N)

    def condition_of(part: slice) -> TextCondition:
        batch = captions.batch(picked_N[part], np.zeros(len(picked_N[part]), dtype=bool))
        return TextCondition(batch.features_BND, batch.mask_BN)

    texts = tuple(captions.text.caption(int(record)) for record in picked_N)
    groups: tuple[TokenGroups, ...] = ()
    if holds_scenes(dataset.manifest):
        side = config.model.input_size // config.model.patch_size
        groups = groups_of_scenes(recorded_scenes(dataset, picked_N), side)
    return CaptionedImages(clean_NCHW, picked_N.tolist(), texts, condition_of, groups)


def groups_of_scenes(scenes: Sequence[DigitScene], side: int) -> tuple[TokenGroups, ...]:
    """What the tokens of scenes show: the digit, and the colour as far as the caption names it; or background.

    Args:
        side: tokens per side.
    """
    digit_NS = np.zeros((len(scenes), side * side), dtype=np.int64)
    colour_NS = np.zeros_like(digit_NS)
    for number, digit_scene in enumerate(scenes):
        group_S = group_of_tokens(digit_scene, side)
        for group, stated in enumerate(digit_scene.stated.groups):
            in_group_S = group_S == group
            digit_NS[number, in_group_S] = 1 + stated.digit
            colour_NS[number, in_group_S] = 1 + (*COLOUR_NAMES, None).index(stated.colour)
    return (
        TokenGroups("digit", (BACKGROUND, *DIGIT_WORDS), digit_NS),
        TokenGroups("colour", (BACKGROUND, *COLOUR_NAMES, NO_COLOUR), colour_NS),
    )
