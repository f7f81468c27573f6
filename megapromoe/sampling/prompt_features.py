"""Text features of prompts, made as those of the captions that a run was trained on.

Each distinct prompt is encoded by itself and rounded as the stored features are, so its features depend on nothing but
its text, and are padded to `model.text_tokens`, so an image does not depend on the other prompts of its chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from megapromoe.config.options import Config
from megapromoe.data.datasets import DatasetError
from megapromoe.data.text_encoder import TextEncoder, TextEncoderError, described, is_same_encoder, open_text_encoder
from megapromoe.data.text_features import FOLDER, TextManifest, decoded, encoded, read_text_manifest
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.distributed import watchdog
from megapromoe.nn.text_condition import TextCondition
from megapromoe.sampling.prompts import Prompt, shortened

logger = logging.getLogger(__name__)

Features = dict[str, np.ndarray]
"""Text -> features of its tokens, float32 (N, D); those of an empty text have no tokens."""


class PromptEncoder:
    """The text encoder of a run.

    Args:
        encoder: the encoder of the captions that the run was trained on.
        dtype: type in which their features are stored; None: unknown, features are not rounded.
        max_tokens: tokens of the longest text that the run was trained on.
    """

    def __init__(self, encoder: TextEncoder, dtype: str | None, max_tokens: int):
        self.encoder, self.dtype, self.max_tokens = encoder, dtype, max_tokens

    @property
    def identity(self) -> dict[str, str | None]:
        """What features depend on besides the text: hashes of weights and tokenizer, the type they are rounded to."""
        hashes = {key: self.encoder.identity[key] for key in ("sha256", "tokenizer_sha256")}
        return {**hashes, "rounded_to": self.dtype}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises SampleError if prompts have more tokens than any text of the training."""
        texts = list(dict.fromkeys(prompt.text for prompt in prompts if prompt.text))
        counts = self.encoder.token_counts(texts) if texts else []
        if longer := [(text, count) for text, count in zip(texts, counts, strict=True) if count > self.max_tokens]:
            text, count = longer[0]
            raise SampleError(
                f"{len(longer)} of {len(texts)} prompts are longer than the {self.max_tokens} tokens of the longest"
                f" text that the model was trained on, such as {shortened(text)} with {count}; shorten them"
            )

    def encode(self, texts: Iterable[str]) -> Features:
        """The features of texts. Raises SampleError if they are not finite."""
        features: Features = {}
        for text in dict.fromkeys(texts):
            values_ND = np.zeros((0, self.encoder.width), dtype=np.float32)
            if text:
                (values_ND,), _ = self.encoder.encode([text])
            if self.dtype is not None:
                values_ND = decoded(encoded(values_ND, self.dtype), self.dtype)
            if not np.isfinite(values_ND).all():
                raise SampleError(f"prompt {shortened(text)}: its text features are not finite; check the text encoder")
            features[text] = values_ND
            watchdog.touch()
        return features


def open_prompt_encoder(config: Config, name: str | None, device: torch.device | str) -> PromptEncoder:
    """Opens the text encoder of a run.

    Args:
        config: config of the run, with `model.condition=text`.
        name: folder or name of the encoder, see `open_text_encoder`; None: as the captions of the run name it.
        device: where the encoder runs.

    Raises SampleError if the encoder is not known, cannot be opened, or did not encode the captions of the run.
    """
    model = config.model
    if config.data.source == "synthetic":
        raise SampleError(
            "data.source = 'synthetic': the run was trained on random text features, which no prompt has; sample from"
            " a run on captions"
        )
    manifest = _manifest(config, required=name is None)
    chosen = name or (manifest.encoder["name"] if manifest else "")
    try:
        encoder = open_text_encoder(chosen, device)
    except TextEncoderError as error:
        hint = "" if name else "; if the folder of the text encoder has moved, give it with --text-encoder"
        raise SampleError(f"{error}{hint}") from error
    if manifest is not None:
        if not is_same_encoder(manifest.encoder, encoder):
            raise SampleError(
                f"text encoder {described(encoder.identity)} did not encode the captions of the run; give the one that"
                f" did, {described(manifest.encoder)}, with --text-encoder"
            )
        encoder.max_tokens = manifest.max_tokens
    if encoder.width != model.text_width:
        raise SampleError(
            f"text encoder {chosen!r}: its features have {encoder.width} channels, the model takes {model.text_width};"
            " give the encoder of the run's captions"
        )
    longest = min(model.text_tokens, encoder.max_tokens)
    return PromptEncoder(encoder, manifest.dtype if manifest else None, longest)


def condition_of(features: Features, texts: Sequence[str], tokens: int) -> TextCondition:
    """The condition of images that show `texts`, padded to `tokens` tokens, on the CPU."""
    width = features[texts[0]].shape[1] if texts else 0
    features_BND = np.zeros((len(texts), tokens, width), dtype=np.float32)
    mask_BN = np.zeros((len(texts), tokens), dtype=bool)
    for row, text in enumerate(texts):
        values_ND = features[text]
        features_BND[row, : len(values_ND)] = values_ND
        mask_BN[row, : len(values_ND)] = True
    return TextCondition(torch.from_numpy(features_BND), torch.from_numpy(mask_BN))


def _manifest(config: Config, required: bool) -> TextManifest | None:
    """The manifest of the captions that a run was trained on; None if it cannot be read and is not required."""
    try:
        return read_text_manifest(Path(config.data.path) / FOLDER)
    except DatasetError as error:
        if required:
            raise SampleError(f"{error}; or give the text encoder of the run's captions with --text-encoder") from error
        logger.warning("cannot check which text encoder encoded the captions of the run: %s", error)
        return None
