"""Text features of a batch: padded to one length, with a mask; nothing of a dropped caption is in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megapromoe.data.datasets import DamagedRecords
from megapromoe.data.latents import Latents
from megapromoe.data.text_features import FOLDER, TextFeatures, TextFeaturesError
from megapromoe.diffusion.noise import normals

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CaptionBatch:
    """Text features of a batch.

    Attributes:
        features_BND: N tokens of D channels, in the stored type; zero where the mask is False.
        mask_BN: True for the tokens of a caption; False for padding, and for all tokens of a dropped caption.
    """

    features_BND: torch.Tensor
    mask_BN: torch.Tensor

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CaptionBatch:
        """The batch with `change` applied to both tensors."""
        return CaptionBatch(change(self.features_BND), change(self.mask_BN))


class CaptionSource(Protocol):
    """Captions of the records of a data set."""

    def batch(self, indices_B: np.ndarray, drop_B: np.ndarray) -> CaptionBatch:
        """The text features of records; those of dropped captions have no tokens."""


class SyntheticCaptions:
    """Random text features, float16, computed from (seed, record): for timing. Record i has 1 + i mod N tokens.

    Args:
        width: channels of a feature.
        max_tokens: tokens N of the longest caption.
        seed: of the features.
    """

    def __init__(self, width: int, max_tokens: int, seed: int):
        self.width, self.max_tokens, self.seed = width, max_tokens, seed

    def batch(self, indices_B: np.ndarray, drop_B: np.ndarray) -> CaptionBatch:
        """The text features of records; those of dropped captions have no tokens."""
        lengths_B = np.where(drop_B, 0, 1 + indices_B % self.max_tokens)
        mask_BN = np.arange(self.max_tokens) < lengths_B[:, None]
        features_BND = normals(self.seed, "synthetic caption", indices_B, (self.max_tokens, self.width))
        features_BND = (features_BND * mask_BN[..., None]).astype(np.float16)
        return CaptionBatch(torch.from_numpy(features_BND), torch.from_numpy(mask_BN))


class Captions:
    """Reads the text features of batches.

    Args:
        text: the text features; record i is that of record i of the images.
        max_tokens: tokens to which captions are padded; None: the longest caption.

    Raises TextFeaturesError if a caption has more than `max_tokens`.
    """

    def __init__(self, text: TextFeatures, max_tokens: int | None = None):
        longest = int(text.tokens.max(initial=1))
        if max_tokens is not None and longest > max_tokens:
            index = int(text.tokens.argmax())
            raise TextFeaturesError(
                f"{text.folder}: {int((text.tokens > max_tokens).sum()):,} captions have more than {max_tokens} tokens,"
                f" record {index} has {longest}; encode again with --max-tokens {max_tokens}, or allow {longest}"
            )
        self.text, self.max_tokens = text, max_tokens or longest

    def batch(self, indices_B: np.ndarray, drop_B: np.ndarray) -> CaptionBatch:
        """The text features of records.

        Args:
            indices_B: record indices, int64.
            drop_B: bool: captions that are dropped; they are not read.

        Raises DamagedRecords, which lists all of these records that cannot be used.
        """
        shape = (len(indices_B), self.max_tokens, self.text.width)
        stored_BND = np.zeros(shape, dtype=np.int16)  # the bits of float16 or bfloat16
        mask_BN = np.zeros(shape[:2], dtype=bool)
        damaged = {}
        for row in np.flatnonzero(~drop_B).tolist():
            try:
                stored_ND = self.text.stored(int(indices_B[row]))
            except DamagedRecords as error:
                damaged[row] = str(error)
            else:
                stored_BND[row, : len(stored_ND)] = stored_ND.view(np.int16)
                mask_BN[row, : len(stored_ND)] = True
        if damaged:
            raise DamagedRecords(list(damaged), "; ".join(damaged.values()))
        features_BND = torch.from_numpy(stored_BND).view(DTYPES[self.text.manifest.dtype])
        return CaptionBatch(features_BND, torch.from_numpy(mask_BN))


def captions_beside(latents: Latents, max_tokens: int | None = None) -> Captions:
    """The captions in the folder of latents; arguments as for `Captions`.

    Raises TextFeaturesError if there are none, or if they belong to other latents.
    """
    text = TextFeatures(latents.folder / FOLDER, latents.verify)
    if text.manifest.latents_sha256 != latents.manifest.identity:
        raise TextFeaturesError(f"{text.folder} belongs to other latents than {latents.folder}; encode again")
    return Captions(text, max_tokens)
