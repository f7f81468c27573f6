"""Features of a pretrained image encoder, the teacher of `model.align_block`: computed once, stored beside latents.

They are a folder of latents of their own, `teacher` in the folder of the latents: record i has the features of the
image of record i, a channel for each of the teacher's and a place for each of its tokens (and those of the mirror
image). So writing, resuming, checking and reading are those of latents. See docs/data.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from megapromoe.data.autoencoder import weights_sha256
from megapromoe.data.datasets import DatasetError
from megapromoe.data.latents import INDEX, MANIFEST, Latents
from megapromoe.diffusion.noise import normals
from megapromoe.errors import UserError

FOLDER = "teacher"  # in a folder of latents
KIND = "teacher "  # before the class of the teacher, in the manifest
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for teachers that state none


class TeacherError(UserError):
    """A teacher cannot be opened, or does not fit."""

    on_all_ranks = True  # every rank opens the same files


class Teacher:
    """An image encoder of transformers in float32, used like an autoencoder that only encodes.

    Args:
        name: by which it was opened.
        model: a vision transformer that returns last hidden states, with `patch_size` and `hidden_size` in its config.
        side: tokens on each side of an image.
        mean, deviation: of each colour, by which images in [0, 1] are normalised.
        device: where the model runs.
    """

    channels, stochastic = 3, False

    def __init__(
        self,
        name: str,
        model: Any,
        side: int,
        mean: tuple[float, ...] = _MEAN,
        deviation: tuple[float, ...] = _DEVIATION,
        device: torch.device | str = "cpu",
    ):
        self.model, self.side = model.eval().requires_grad_(False).to(device), side
        self.pixels = side * int(model.config.patch_size)
        self.width = int(model.config.hidden_size)
        self._mean, self._deviation = (
            torch.tensor(values, device=device)[:, None, None] for values in (mean, deviation)
        )
        self.scale, self.shift = (1.0,) * self.width, (0.0,) * self.width
        self.identity = {"name": name, "kind": f"{KIND}{type(model).__name__}", "sha256": weights_sha256(model)}
        self.identity |= {"pixels": str(self.pixels)}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(W, H, W): channels, and tokens on each side, whatever the resolution of the images."""
        return self.width, self.side, self.side

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        """Features (B, W, side, side) float32 of images (B, 3, R, R) in [-1, 1], which are resized for the model.

        Raises TeacherError if the model has fewer tokens.
        """
        x = (images.to(self._mean.device).float() + 1) / 2
        x = F.interpolate(x, size=(self.pixels, self.pixels), mode="bicubic", antialias=True, align_corners=False)
        hidden_BND = self.model(pixel_values=(x - self._mean) / self._deviation).last_hidden_state
        if hidden_BND.shape[1] < self.side**2:
            raise TeacherError(
                f"teacher {self.identity['name']!r}: has {hidden_BND.shape[1]} tokens for {self.pixels} pixels, not"
                f" {self.side**2}; give another --teacher-side"
            )
        # Tokens of the class and registers come first.
        return hidden_BND[:, -(self.side**2) :].transpose(1, 2).unflatten(2, (self.side, self.side)).float(), None


def open_teacher(name: str, side: int, device: torch.device | str = "cpu") -> Teacher:
    """Opens a teacher without network access.

    Args:
        name: a folder as transformers saves it, such as of DINOv2.
        side: tokens on each side of an image.

    Raises TeacherError if the folder holds no such model with safetensors weights, or transformers is not installed.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"teacher {name!r}: {folder / 'config.json'} does not exist; give a folder as transformers saves it, such"
            " as a download of facebook/dinov2-base"
        )
    try:
        import transformers
    except ImportError as error:
        raise TeacherError(f"teacher {name!r} needs transformers: pip install 'megapromoe[text]'") from error
    transformers.logging.disable_progress_bar()
    try:
        # No code of the folder is executed, and no pickle is read: safetensors only.
        model = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        file = folder / "preprocessor_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean, deviation = settings.get("image_mean", _MEAN), settings.get("image_std", _DEVIATION)
        if not all(len(values) == 3 and all(float(v) == v for v in values) for values in (mean, deviation)):
            raise ValueError(f"{file}: image_mean and image_std must be three numbers each")
    except Exception as error:  # raised by transformers for files that are missing, damaged or of another kind
        reason = " ".join(str(error).split())
        raise TeacherError(
            f"teacher {name!r} cannot be opened: {reason[:300]}; give a folder with config.json and a .safetensors file"
        ) from error
    if not all(isinstance(getattr(model.config, key, None), int) for key in ("patch_size", "hidden_size")):
        kind = type(model).__name__
        raise TeacherError(f"teacher {name!r} is a {kind}, not a vision transformer with patch_size and hidden_size")
    return Teacher(name, model, side, tuple(mean), tuple(deviation), device)


class TeacherFeatures(Protocol):
    """Features of the records of a data set; `Latents` and `SyntheticTeacher`."""

    shape: tuple[int, int, int]

    def sample(self, indices_B: np.ndarray, mirror_B: np.ndarray, normal_BCHW: np.ndarray | None) -> np.ndarray:
        """Features (B, W, H, W) float32 of records, of the mirror image where `mirror_B`; the last is not used."""


class SyntheticTeacher:
    """Random features, computed from (seed, record): for timing.

    Args:
        width: channels of a feature.
        side: tokens on each side.
        seed: of the features.
    """

    def __init__(self, width: int, side: int, seed: int):
        self.shape, self.seed = (width, side, side), seed

    def sample(self, indices_B: np.ndarray, mirror_B: np.ndarray, normal_BCHW: np.ndarray | None) -> np.ndarray:
        """See `TeacherFeatures.sample`."""
        features = normals(self.seed, "synthetic teacher", indices_B, self.shape)
        features[mirror_B] = features[mirror_B][..., ::-1]
        return features


def teacher_beside(latents: Latents) -> Latents:
    """The teacher's features in the folder of latents.

    Raises DatasetError if there are none, or if they are of other images.
    """
    folder = latents.folder / FOLDER
    if not (folder / MANIFEST).exists():
        raise DatasetError(
            f"{folder} holds no features of a teacher, which model.align_block needs: repeat the command that encoded"
            f" {latents.folder} with --teacher PATH, or set model.align_block=0"
        )
    features = Latents(folder, verify=latents.verify)
    if not features.manifest.autoencoder.get("kind", "").startswith(KIND):
        raise DatasetError(f"{folder} holds latents, not features of a teacher; encode them again with --teacher PATH")
    if _names(features) != _names(latents) or len(features) != len(latents):
        raise DatasetError(f"{folder} has features of other images than {latents.folder}: encode into a new folder")
    return features


def _names(latents: Latents) -> bytes:
    with safe_open(latents.folder / INDEX, "np") as file:
        return file.get_tensor("names").tobytes() + file.get_tensor("name_ends").tobytes()
