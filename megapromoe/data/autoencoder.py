"""Autoencoders between images and latents: diffusers' AutoencoderKL and AutoencoderTiny, or none (pixels).

There are three kinds of values: images in [-1, 1]; *raw* latents, the output of the encoder, which are stored; and
*latents*, the input of a model: `(raw - shift) * scale` for each channel.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megapromoe.errors import UserError

NONE = "none"  # the name for training on pixels, without an autoencoder


class AutoencoderError(UserError):
    """An autoencoder cannot be opened, or does not fit the images or latents."""


class Encoder(Protocol):
    """Encodes batches of square images: an autoencoder, or the teacher of `teacher.py`."""

    identity: dict[str, str]
    """`name` by which it was opened, `kind`: its class, `sha256` of its weights. The latents' manifest records it."""
    channels: int
    """Channels of the images."""
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    """For each raw channel: latents = (raw - shift) * scale."""
    stochastic: bool
    """Whether the encoder returns a normal distribution (mean and log-variance) or a single value."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image of `resolution` x `resolution` pixels; raises AutoencoderError."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes images (B, channels, R, R) in [-1, 1] to raw mean and log-variance (B, C, H, W) float32.

        The log-variance is None if the autoencoder is not stochastic.
        """


class Autoencoder(Encoder, Protocol):
    """Encodes and decodes batches of square images."""

    def resolution(self, latent_size: int) -> int:
        """Side in pixels of the image of a latent with side `latent_size`: the inverse of `latent_shape`."""

    def normalise(self, raw: Tensor) -> Tensor:
        """Converts raw latents (B, C, H, W) to latents of the same shape, float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (B, channels, R, R) float32 in [-1, 1], on the autoencoder's device."""


def open_autoencoder(name: str, device: torch.device | str = "cpu", channels: int = 3) -> Autoencoder:
    """Opens an autoencoder in float32 on `device`.

    Args:
        name: a folder in diffusers' format (or one with such a subfolder `vae`), a name on the Hugging Face hub such as
            "stabilityai/sd-vae-ft-ema" (or "owner/name/subfolder"), or "none": pixels.
        channels: channels of the images, 1 or 3 with "none"; otherwise it must be that of the autoencoder.

    Raises:
        AutoencoderError: the autoencoder does not exist, diffusers is not installed, the weights are not in
            safetensors files, or the number of channels is another.
    """
    if name == NONE:
        return Pixels(channels)
    try:
        import diffusers
    except ImportError as error:
        raise AutoencoderError(
            f"autoencoder {name!r} needs diffusers: pip install 'megapromoe[images]', or use {NONE!r}: pixels"
        ) from error
    location = _load_arguments(name)
    try:
        kind = diffusers.AutoencoderKL.load_config(**location).get("_class_name")
        if kind not in _CLASSES:
            raise AutoencoderError(
                f"autoencoder {name!r} is a {kind}; give an {' or an '.join(_CLASSES)} as diffusers saves them"
            )
        # safetensors only: the other format is pickle, which can execute arbitrary code
        model = getattr(diffusers, kind).from_pretrained(
            **location, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except (OSError, ValueError) as error:  # raised by diffusers for a missing or damaged file, or without network
        if isinstance(error, AutoencoderError):
            raise
        reason = " ".join(str(error).split())
        raise AutoencoderError(
            f"autoencoder {name!r} cannot be opened: {reason}; give a folder that holds config.json and a .safetensors"
            f" file, a name on the Hugging Face hub, or {NONE!r}"
        ) from error
    opened = wrap_autoencoder(name, model, device)
    if channels != opened.channels:
        raise AutoencoderError(f"autoencoder {name!r} takes {opened.channels} channels, the images have {channels}")
    return opened


def wrap_autoencoder(name: str, model: Any, device: torch.device | str) -> Autoencoder:
    """An AutoencoderKL or AutoencoderTiny of diffusers as an autoencoder on `device`.

    Raises AutoencoderError for a model of another class.
    """
    kind = type(model).__name__
    if kind not in _CLASSES:
        raise AutoencoderError(f"autoencoder {name!r} is a {kind}; give an {' or an '.join(_CLASSES)}")
    return _CLASSES[kind](name, model, device)


def _load_arguments(name: str) -> dict:
    """The arguments of from_pretrained for a local folder, without network access, or for a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        inside = not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists()
        folder = folder / "vae" if inside else folder
        return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) < 2 or not all(parts):
        raise AutoencoderError(
            f"autoencoder {name!r}: no such folder, and no owner/name on the Hugging Face hub; or use {NONE!r}: pixels"
        )
    return {"pretrained_model_name_or_path": "/".join(parts[:2]), "subfolder": "/".join(parts[2:]) or None}


def renormalised(autoencoder: Autoencoder, scale: Sequence[float], shift: Sequence[float]) -> Autoencoder:
    """The autoencoder with the scale and shift of latents that were normalised in another way than its own.

    Args:
        scale, shift: of each channel, as the manifest of the latents records them.

    Raises AutoencoderError if the autoencoder has another number of channels.
    """
    if (tuple(scale), tuple(shift)) == (autoencoder.scale, autoencoder.shift):
        return autoencoder
    if len(scale) != len(autoencoder.scale):
        raise AutoencoderError(
            f"the latents have {len(scale)} channels, those of autoencoder {autoencoder.identity['name']!r} have"
            f" {len(autoencoder.scale)}: give the autoencoder that made the latents"
        )
    other = copy.copy(autoencoder)
    other.scale, other.shift = tuple(scale), tuple(shift)
    return other


class Pixels:
    """No autoencoder: raw latents are the pixels' bytes, 0..255, and latents are the image in [-1, 1]."""

    identity = {"name": NONE, "kind": "pixels", "sha256": ""}
    stochastic = False

    def __init__(self, channels: int):
        if channels not in (1, 3):
            raise AutoencoderError(f"autoencoder {NONE!r}: images have 1 or 3 channels, not {channels}")
        self.channels = channels
        self.scale, self.shift = (1 / 127.5,) * channels, (127.5,) * channels

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return self.channels, resolution, resolution

    def resolution(self, latent_size: int) -> int:
        return latent_size

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return ((images.float() + 1) * 127.5).round().clamp(0, 255), None

    def normalise(self, raw: Tensor) -> Tensor:
        return raw.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)


class _Diffusers:
    """The common part of diffusers' autoencoders."""

    def __init__(self, name: str, model, device: torch.device | str, blocks: int):
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        settings = model.config
        self.channels, self.latent_channels = settings.in_channels, settings.latent_channels
        self.factor = 2 ** (blocks - 1)
        self.scale, self.shift = _affine(settings, self.latent_channels)
        self.identity = {"name": name, "kind": type(model).__name__, "sha256": weights_sha256(model)}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        if resolution < 1 or resolution % self.factor:
            near = ", ".join(
                str(n * self.factor) for n in (resolution // self.factor, resolution // self.factor + 1) if n
            )
            raise AutoencoderError(
                f"resolution {resolution} must be a multiple of {self.factor}, the downsampling factor of the"
                f" autoencoder; nearest: {near}"
            )
        return self.latent_channels, resolution // self.factor, resolution // self.factor

    def resolution(self, latent_size: int) -> int:
        return latent_size * self.factor

    def normalise(self, raw: Tensor) -> Tensor:
        scale, shift = (torch.tensor(v, device=raw.device).view(1, -1, 1, 1) for v in (self.scale, self.shift))
        return (raw.float() - shift) * scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        if latents.shape[1] != self.latent_channels:
            raise AutoencoderError(
                f"latents have {latents.shape[1]} channels, those of autoencoder {self.identity['name']!r} have"
                f" {self.latent_channels}: give the autoencoder that made the latents"
            )
        latents = latents.to(self.device, torch.float32)
        scale, shift = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.scale, self.shift))
        raw = (latents / scale + shift).to(self.model.dtype)
        return self.model.decode(raw).sample.float().clamp(-1, 1)

    def _images(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.channels:
            name = self.identity["name"]
            raise AutoencoderError(f"autoencoder {name!r} takes {self.channels} channels, not {images.shape[1]}")
        return images.to(self.device, torch.float32)


class _KL(_Diffusers):
    """AutoencoderKL, such as the SD-VAE: the encoder returns a normal distribution."""

    stochastic = True

    def __init__(self, name: str, model, device: torch.device | str):
        super().__init__(name, model, device, len(model.config.block_out_channels))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(self._images(images)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()


class _Tiny(_Diffusers):
    """AutoencoderTiny (TAESD): the encoder returns a single value."""

    stochastic = False

    def __init__(self, name: str, model, device: torch.device | str):
        super().__init__(name, model, device, len(model.config.encoder_block_out_channels))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.model.encode(self._images(images)).latents.float(), None


_CLASSES: dict[str, type[_KL] | type[_Tiny]] = {"AutoencoderKL": _KL, "AutoencoderTiny": _Tiny}


def _affine(settings, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel from an autoencoder's settings, as in diffusers' pipelines.

    If the settings have a mean and standard deviation per channel, latents are (raw - mean) * scaling_factor / std.
    """
    factor = float(getattr(settings, "scaling_factor", None) or 1.0)
    mean, std = getattr(settings, "latents_mean", None), getattr(settings, "latents_std", None)
    if mean is not None and std is not None:
        return tuple(factor / float(s) for s in std), tuple(float(m) for m in mean)
    shift = float(getattr(settings, "shift_factor", None) or 0.0)
    return (factor,) * channels, (shift,) * channels


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of the names, shapes, types and values of the weights, independent of the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
