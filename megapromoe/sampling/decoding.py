"""Decodes generated latents to images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.options import Config
from megapromoe.data.autoencoder import NONE, Autoencoder, AutoencoderError, open_autoencoder, renormalised
from megapromoe.data.datasets import DatasetError
from megapromoe.data.sources import autoencoder_identity, latents_description
from megapromoe.diffusion.image_grid import SampleError

logger = logging.getLogger(__name__)

DECODE_BATCH = 16  # latents per decoder call: the activations of the decoder take far more memory than the latents
PIXELS = ("digits", "fashion_mnist")  # sources whose records are pixels


def open_decoder(
    config: Config, name: str | None, device: torch.device | str, run: Path | None = None
) -> Autoencoder | None:
    """Opens the autoencoder that decodes the images of a run; None if the run generates pixels.

    Args:
        config: config of the run.
        name: name or path, see `data.autoencoder.open_autoencoder`; None: not given.
        device: device of the autoencoder.
        run: the run directory, which records what is known of the latents; read if their manifest cannot be read.

    Raises SampleError if one is needed but not given, if one is given but not needed, or if it is not the autoencoder
    that encoded the latents of the run.
    """
    m, source = config.model, config.data.source
    trained, normalisation = _known_of_latents(config, run)
    pixels = source in PIXELS or trained is not None and trained["kind"] == "pixels"
    if name in (None, NONE):
        if pixels or trained is None and m.in_channels in (1, 3):
            return None
        which = f" {trained['name']!r}" if trained else ""
        raise SampleError(
            f"model.in_channels = {m.in_channels}: the run generates latents and does not contain their autoencoder"
            f"{which}; give --autoencoder PATH"
        )
    if pixels:
        raise SampleError(f"autoencoder = {name!r}: the run generates pixels (data.source = {source!r}); leave it out")
    try:
        opened = open_autoencoder(name, device)
        makes = opened.latent_shape(opened.resolution(m.input_size))
    except AutoencoderError as error:
        raise SampleError(str(error)) from error
    generates = (m.in_channels, m.input_size, m.input_size)
    if makes != generates:
        raise SampleError(f"autoencoder = {name!r}: its latents have shape {makes}, the run generates {generates}")
    if trained and trained["sha256"] != opened.identity["sha256"]:
        raise SampleError(
            f"autoencoder = {name!r} (sha256 {opened.identity['sha256'][:12]}): the run's latents were encoded by"
            f" {trained['name']!r} (sha256 {trained['sha256'][:12]}); give that autoencoder"
        )
    return renormalised(opened, *normalisation) if normalisation else opened


def _known_of_latents(
    config: Config, run: Path | None
) -> tuple[dict[str, str] | None, tuple[Sequence[float], Sequence[float]] | None]:
    """Identity of the autoencoder of a run's latents, and their scale and shift; None for what is not recorded."""
    try:
        identity, known = autoencoder_identity(config), latents_description(config)
    except DatasetError as error:  # generation does not need the data of the run
        known = RunDirectory(run).recorded_latents() if run else None
        if known is None:
            logger.warning(
                "cannot check which autoencoder encoded the latents of the run, nor how they were normalised, so that"
                " the autoencoder's own scale is used: %s",
                error,
            )
            return None, None
        identity = known["autoencoder"]
    return identity, (known["scale"], known["shift"]) if known else None


def normalisation_of_latents(config: Config, run: Path) -> tuple[list[float], list[float]] | None:
    """Scale and shift of each channel of a run's latents, raw = latents / scale + shift; None if not recorded."""
    try:
        known = latents_description(config)
    except DatasetError:
        known = RunDirectory(run).recorded_latents()
    return (known["scale"], known["shift"]) if known else None


@torch.no_grad()
def decoded(drawn_BCHW: Tensor, decoder: Autoencoder | None) -> Tensor:
    """Decodes generated latents (B, C, H, W) to images (B, C, H, W), about [-1, 1]; unchanged without a decoder."""
    if decoder is None:
        return drawn_BCHW
    return torch.cat([decoder.decode(part) for part in drawn_BCHW.split(DECODE_BATCH)])
