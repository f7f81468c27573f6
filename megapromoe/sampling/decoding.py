"""From what a model generates to images: the autoencoder of its latents."""

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

AT_ONCE = 16  # latents decoded together: a picture of a decoder's widest layer takes far more memory than a latent
PIXELS = ("digits", "fashion_mnist")  # sources whose records are pixels


def open_decoder(config: Config, name: str | None, device: torch.device | str) -> Autoencoder | None:
    """The autoencoder for what a run draws; None where it draws pixels.

    Args:
        name: as `data.autoencoder.open_autoencoder` takes it; None: none was given.

    Raises SampleError: one is needed, or none may be, or it is not the one of the run's latents.
    """
    m, source = config.model, config.data.source
    trained = _of_latents(config)
    pixels = source in PIXELS or trained is not None and trained["kind"] == "pixels"
    if name in (None, NONE):
        if pixels or trained is None and m.in_channels in (1, 3):
            return None
        which = f" {trained['name']!r}" if trained else ""
        raise SampleError(
            f"model.in_channels = {m.in_channels}: the run draws latents, whose autoencoder{which} it does not hold;"
            " give --autoencoder PATH"
        )
    if pixels:
        raise SampleError(f"autoencoder = {name!r}: the run draws pixels (data.source = {source!r}); leave it out")
    try:
        opened = open_autoencoder(name, device)
        makes = opened.latent_shape(opened.resolution(m.input_size))
    except AutoencoderError as error:
        raise SampleError(str(error)) from error
    draws = (m.in_channels, m.input_size, m.input_size)
    if makes != draws:
        raise SampleError(f"autoencoder = {name!r}: its latents have shape {makes}, the run draws {draws}")
    if trained and trained["sha256"] != opened.identity["sha256"]:
        raise SampleError(
            f"autoencoder = {name!r} (sha256 {opened.identity['sha256'][:12]}): the run's latents are of"
            f" {trained['name']!r} (sha256 {trained['sha256'][:12]}); give that one"
        )
    return opened


def _of_latents(config: Config) -> dict[str, str] | None:
    """Identity of the autoencoder that made a run's latents; None where nothing says it."""
    try:
        return autoencoder_identity(config)
    except DatasetError as error:  # a run can draw where its data are not
        logger.warning("which autoencoder made the run's latents cannot be checked: %s", error)
        return None


@torch.no_grad()
def decoded(drawn_BCHW: Tensor, decoder: Autoencoder | None) -> Tensor:
    """Images (B, C, H, W), about [-1, 1], of what a model drew."""
    if decoder is None:
        return drawn_BCHW
    return torch.cat([decoder.decode(part) for part in drawn_BCHW.split(AT_ONCE)])
