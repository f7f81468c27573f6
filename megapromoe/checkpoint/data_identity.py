"""What a run records of its data set. If it cannot be read, opening it later raises the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.io import sha256_of_json


def described_latents(config: Config) -> dict[str, Any] | None:
    """See `sources.latents_description`; None also if the manifest cannot be read."""
    if config.data.source != "latents":
        return None
    from megapromoe.data.datasets import DatasetError  # these import numpy and safetensors
    from megapromoe.data.sources import latents_description

    try:
        return latents_description(config)
    except DatasetError:
        return None


def data_identity(config: Config) -> str | None:
    """SHA-256 of the manifest of the latents that a run trains on; None for other sources, or if it cannot be read.

    With `model.condition=text` that of the captions' manifest, which contains the latents' and the encoder's; with
    `model.align_block` a hash of it and of that of the teacher's features. Opening the data set later raises the
    reason.
    """
    if config.data.source != "latents":
        return None
    from megapromoe.data.datasets import DatasetError  # these import numpy and safetensors
    from megapromoe.data.latents import read_manifest
    from megapromoe.data.teacher import FOLDER as TEACHER
    from megapromoe.data.text_features import FOLDER, read_text_manifest

    folder = Path(config.data.path)
    try:
        identity = (read_text_manifest(folder / FOLDER) if config.model.has_text else read_manifest(folder)).identity
        if config.model.align_block:
            return sha256_of_json([identity, read_manifest(folder / TEACHER).identity])
        return identity
    except DatasetError:
        return None
