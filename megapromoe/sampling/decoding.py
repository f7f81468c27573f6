"""Decodes generated latents to images."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.data.autoencoder import NONE, Autoencoder, AutoencoderError, open_autoencoder
from megapromoe.data.datasets import DatasetError
from megapromoe.data.sources import autoencoder_identity
from megapromoe.diffusion.image_grid import SampleError

logger = logging.getLogger(__name__)

DECODE_BATCH = 16  # latents per decoder call: the activations of the decoder take far more memory than the latents
PIXELS = ("digits", "fashion_mnist")  # sources whose records are pixels


def open_decoder(config: Config, name: str | None, device: torch.device | str) -> Autoencoder | None:
    """Opens the autoencoder that decodes the images of a run; None if the run generates pixels.

    Args:
        config: config of the run.
        name: name or path, see `data.autoencoder.open_autoencoder`; None: not given.
        device: device of the autoencoder.

    Raises SampleError if one is needed but not given, if one is given but not needed, or if it is not the autoencoder
    that encoded the latents of the run.
    """
    m, source = config.model, config.data.source
    trained = _latents_autoencoder(config)
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
    return opened


def _latents_autoencoder(config: Config) -> dict[str, str] | None:
    """Identity of the autoencoder that encoded the latents of a run; None if it is not recorded."""
    try:
        return autoencoder_identity(config)
    except DatasetError as error:  # generation does not need the data of the run
        logger.warning("cannot check which autoencoder encoded the latents of the run: %s", error)
        return None


@torch.no_grad()
def decoded(drawn_BCHW: Tensor, decoder: Autoencoder | None) -> Tensor:
    """Decodes generated latents (B, C, H, W) to images (B, C, H, W), about [-1, 1]; unchanged without a decoder."""
    if decoder is None:
        return drawn_BCHW
    return torch.cat([decoder.decode(part) for part in drawn_BCHW.split(DECODE_BATCH)])
