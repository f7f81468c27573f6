"""Autoencoders between images and what a model is trained on: diffusers' AutoencoderKL and AutoencoderTiny, or pixels.

Three spaces: images in [-1, 1]; *raw* latents, as the autoencoder makes them and as they are stored; *latents*, what a
model sees: `(raw - shift) * scale`, channel by channel.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megapromoe.errors import UserError

NONE = "none"  # the name of the autoencoder that is none


class AutoencoderError(UserError):
    """An autoencoder that cannot be opened, or not used for these images."""


class Autoencoder(Protocol):
    """Encodes and decodes batches of square images."""

    identity: dict[str, str]
    """`name` as it was opened, `kind` its class, `sha256` of its weights by name; what latents remember of it."""
    channels: int
    """Of the images."""
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    """Of each raw channel: latents = (raw - shift) * scale."""
    stochastic: bool
    """Whether a latent is a normal distribution, with a variance, or a value."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a `resolution` x `resolution` image; raises AutoencoderError."""

    def resolution(self, latent_size: int) -> int:
        """Side of the image of a latent of this side: the inverse of `latent_shape`."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw mean and log-variance (B, C, H, W) float32 of images (B, channels, R, R); None: no variance."""

    def normalise(self, raw: Tensor) -> Tensor:
        """Latents (B, C, H, W) float32 of raw ones."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, channels, R, R) float32 in [-1, 1] of latents, on the autoencoder's device."""


def open_autoencoder(name: str, device: torch.device | str = "cpu", channels: int = 3) -> Autoencoder:
    """The autoencoder of this name, ready on `device`, in float32.

    Args:
        name: a folder that diffusers wrote (or one with such a folder `vae` in it), a name on the Hugging Face hub such
            as "stabilityai/sd-vae-ft-ema" (or "owner/name/subfolder"), or "none": pixels.
        channels: of the images; only "none" can choose.

    Raises:
        AutoencoderError: there is none of this name, diffusers is missing, its weights are not safetensors, or its
            images have other channels.
    """
    if name == NONE:
        return Pixels(channels)
    try:
        import diffusers
    except ImportError as error:
        raise AutoencoderError(
            f"autoencoder {name!r} needs diffusers: pip install 'megapromoe[images]', or use {NONE!r}: pixels"
        ) from error
    where = _place(name)
    try:
        kind = diffusers.AutoencoderKL.load_config(**where).get("_class_name")
        classes: dict[str, type[_KL] | type[_Tiny]] = {"AutoencoderKL": _KL, "AutoencoderTiny": _Tiny}
        if kind not in classes:
            raise AutoencoderError(
                f"autoencoder {name!r} is a {kind}; give an {' or an '.join(classes)} as diffusers saves them"
            )
        # safetensors only: the other format is pickle, which runs what a stranger put in it
        model = getattr(diffusers, kind).from_pretrained(
            **where, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except (OSError, ValueError) as error:  # what diffusers raises for a missing file, no network, a broken one
        if isinstance(error, AutoencoderError):
            raise
        reason = " ".join(str(error).split())
        raise AutoencoderError(
            f"autoencoder {name!r} cannot be opened: {reason}; give a folder that holds config.json and a .safetensors"
            f" file, a name on the Hugging Face hub, or {NONE!r}"
        ) from error
    opened = classes[kind](name, model, device)
    if channels != opened.channels:
        raise AutoencoderError(f"autoencoder {name!r} takes {opened.channels} channels, the images have {channels}")
    return opened


def _place(name: str) -> dict:
    """Arguments of from_pretrained: a local folder never asks the network, and a name is never taken for a folder."""
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


class Pixels:
    """No autoencoder: raw latents are the bytes of the pixels, 0..255, and latents the image in [-1, 1]."""

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
    """What the autoencoders of diffusers have in common."""

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
                f"resolution {resolution} must be a multiple of {self.factor}, by which the autoencoder shrinks images;"
                f" nearest: {near}"
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
                f"latents have {latents.shape[1]} channels, autoencoder {self.identity['name']!r} makes"
                f" {self.latent_channels}: they are not of this autoencoder"
            )
        latents = latents.to(self.device, torch.float32)
        scale, shift = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.scale, self.shift))
        return self.model.decode(latents / scale + shift).sample.float().clamp(-1, 1)

    def _images(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.channels:
            name = self.identity["name"]
            raise AutoencoderError(f"autoencoder {name!r} takes {self.channels} channels, not {images.shape[1]}")
        return images.to(self.device, torch.float32)


class _KL(_Diffusers):
    """AutoencoderKL, such as the SD-VAE: a latent is a normal distribution."""

    stochastic = True

    def __init__(self, name: str, model, device: torch.device | str):
        super().__init__(name, model, device, len(model.config.block_out_channels))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(self._images(images)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()


class _Tiny(_Diffusers):
    """AutoencoderTiny (TAESD): a latent is a value."""

    stochastic = False

    def __init__(self, name: str, model, device: torch.device | str):
        super().__init__(name, model, device, len(model.config.encoder_block_out_channels))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.model.encode(self._images(images)).latents.float(), None


def _affine(settings, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel, as diffusers' pipelines use an autoencoder's settings.

    A mean and deviation of each channel, where given, stand for the shift: (raw - mean) * scaling_factor / std.
    """
    factor = float(getattr(settings, "scaling_factor", None) or 1.0)
    mean, std = getattr(settings, "latents_mean", None), getattr(settings, "latents_std", None)
    if mean is not None and std is not None:
        return tuple(factor / float(s) for s in std), tuple(float(m) for m in mean)
    shift = float(getattr(settings, "shift_factor", None) or 0.0)
    return (factor,) * channels, (shift,) * channels


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of names, shapes, types and values: the same however the weights came here."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
