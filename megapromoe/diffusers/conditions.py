"""What the images of a pipeline show: classes by number or name, and texts by an encoder of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.data.text_encoder import TextEncoder, described, is_same_encoder, open_text_encoder
from megapromoe.data.text_features import STORED
from megapromoe.diffusers.transformer import DiffusersInputError
from megapromoe.nn.text_condition import TextCondition
from megapromoe.sampling.prompt_features import PromptEncoder, condition_of
from megapromoe.sampling.prompts import Prompt


class ClassNames:
    """The names of the classes of a model; each of a list, such as "tench, Tinca tinca", is a name too."""

    def __init__(self, id2label: Mapping[str, str], model: ModelConfig):
        """Raises DiffusersInputError unless `id2label` has the classes of the model as keys, and texts as values."""
        self.num_classes = model.num_classes
        self._full_names: dict[str, list[int]] = {}
        self._short_names: dict[str, list[int]] = {}
        for label, name in id2label.items():
            if not str(label).isdecimal() or int(label) >= model.num_classes or not isinstance(name, str):
                raise DiffusersInputError(
                    f"id2label: has {label!r}: {name!r}, must have names of the classes 0..{model.num_classes - 1}"
                )
            self._full_names.setdefault(name.strip(), []).append(int(label))
            for part in {part.strip() for part in name.split(",")}:
                self._short_names.setdefault(part, []).append(int(label))

    def ids(self, names: Sequence[str]) -> list[int]:
        """The classes with the given names. Raises DiffusersInputError for a name that no class has, or several."""
        result = []
        for name in names:
            classes = self._full_names.get(name) or self._short_names.get(name) or []
            if len(classes) != 1:
                problem = f"is the name of the classes {classes}" if classes else "is no name of a class"
                known = ", ".join(map(repr, list(self._full_names)[:5])) or "none"
                raise DiffusersInputError(f"class_labels: {name!r} {problem}; names are {known} ...; or give a number")
            result += classes
        return result

    def numbers(self, labels: Any) -> list[int]:
        """The classes of numbers and names, one or several. Raises DiffusersInputError for those that do not exist."""
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.reshape(-1).tolist()
        if isinstance(labels, (str, int, np.integer)):
            labels = [labels]
        numbers = []
        for label in labels:
            if isinstance(label, str):
                numbers += self.ids([label])
            elif type(label) is bool or not isinstance(label, (int, np.integer)) or not 0 <= label <= self.num_classes:
                raise DiffusersInputError(
                    f"class_labels: {label!r} must be a class, 0..{self.num_classes - 1}, its name, or"
                    f" {self.num_classes} for no class"
                )
            else:
                numbers.append(int(label))
        if not numbers:
            raise DiffusersInputError("class_labels: is empty; give at least one class")
        return numbers


_IDENTITY = ("name", "kind", "sha256", "tokenizer_sha256", "rounded_to", "max_tokens")


def _is_identity(identity: Mapping[str, Any]) -> bool:
    """Whether these are the facts of a text encoder."""
    *texts, tokens = (identity.get(key) for key in _IDENTITY)
    return all(isinstance(text, str) for text in texts) and texts[-1] in STORED and type(tokens) is int


class TextEncoding:
    """The encoder of prompts, which must be that of the captions of the training.

    Args:
        model: the model of texts.
        identity: of the encoder, as `megapromoe/data/text_encoder.py` records it, with `rounded_to`, the type to which
            features are rounded, and `max_tokens`, the tokens of the longest text; None: unknown.
    """

    def __init__(self, model: ModelConfig, identity: Mapping[str, Any] | None):
        if identity is not None and not _is_identity(identity):
            raise DiffusersInputError(
                f"encoder_identity = {dict(identity)}: must have {', '.join(_IDENTITY)}; restore model_index.json"
            )
        self.model, self.identity = model, identity
        self._encoder: PromptEncoder | None = None

    def open(self, name: str, device: torch.device) -> tuple[Any, Any]:
        """Opens an encoder; returns its model and its tokenizer. Raises TextEncoderError, DiffusersInputError."""
        encoder = open_text_encoder(name, device)
        self._encoder = self._checked(encoder)
        return encoder.model, encoder.tokenizer

    def of_prompts(self, texts: list[str], text_encoder: Any, tokenizer: Any, device: torch.device) -> TextCondition:
        """The features of prompts. Raises DiffusersInputError for an encoder that is missing or does not fit.

        Raises SampleError for prompts that are too long.
        """
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DiffusersInputError(f"prompt = {texts!r}: give a text, or a list of texts")
        if text_encoder is None or tokenizer is None:
            raise DiffusersInputError(
                "prompt: the pipeline has no text encoder; open that of the training with"
                " pipe.load_text_encoder(FOLDER), or give prompt_embeds"
            )
        dtype = next(text_encoder.parameters()).dtype
        if dtype != torch.float32:
            raise DiffusersInputError(
                f"text_encoder: is {dtype}, but the features of the training were computed in float32; call"
                " pipe.text_encoder.float()"
            )
        if self._encoder is None or self._encoder.encoder.model is not text_encoder:
            longest = int(self.identity["max_tokens"]) if self.identity else self.model.text_tokens
            self._encoder = self._checked(TextEncoder("text_encoder", text_encoder, tokenizer, device, longest))
        self._encoder.encoder.device = device
        self._encoder.check([Prompt(text) for text in texts])
        return condition_of(self._encoder.encode(texts), texts, self.model.text_tokens)

    def padded(self, features_BND: Tensor, mask_BN: Tensor | None) -> TextCondition:
        """Given features, padded to the longest text of the model. Raises DiffusersInputError unless they fit it."""
        if mask_BN is None:
            mask_BN = torch.ones(features_BND.shape[:2], dtype=torch.bool, device=features_BND.device)
        text = TextCondition(features_BND.float(), mask_BN)
        try:
            text.check(self.model, len(features_BND))
        except ValueError as error:
            raise DiffusersInputError(f"prompt_embeds, prompt_embeds_mask: {error}") from error
        more = self.model.text_tokens - features_BND.shape[1]
        return TextCondition(F.pad(text.features_BND, (0, 0, 0, more)), F.pad(mask_BN, (0, more)))

    def _checked(self, encoder: TextEncoder) -> PromptEncoder:
        """The encoder of prompts. Raises DiffusersInputError if it is not that of the training."""
        if encoder.width != self.model.text_width:
            raise DiffusersInputError(
                f"text_encoder: its features have {encoder.width} channels, the model takes {self.model.text_width};"
                " give the encoder of the training"
            )
        if self.identity is None:
            return PromptEncoder(encoder, None, min(self.model.text_tokens, encoder.max_tokens))
        expected = {key: str(value) for key, value in self.identity.items()}
        if not is_same_encoder(expected, encoder):
            raise DiffusersInputError(
                f"text_encoder: {described(encoder.identity)} did not encode the captions of the training; give the one"
                f" that did, {described(expected)}"
            )
        encoder.max_tokens = int(self.identity["max_tokens"])
        longest = min(self.model.text_tokens, encoder.max_tokens)
        return PromptEncoder(encoder, self.identity["rounded_to"], longest)
