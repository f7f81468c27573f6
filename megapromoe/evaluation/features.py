"""Feature networks for image metrics: the standard Inception, a TorchScript file, or a classifier trained here.

Only metrics of the standard Inception are called FID, sFID and Inception score; those of other networks contain the
name of the network. A network is called with uint8 images (N, C, H, W) and returns `Features`.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megapromoe.errors import UserError
from megapromoe.evaluation.inception import Inception
from megapromoe.evaluation.names import CLASSIFIERS
from megapromoe.evaluation.pixels import open_pixels
from megapromoe.io import sha256_of
from megapromoe.sampling.image_sets import ImageSetError

# Hashes of the published files of the standard network, TensorFlow's inception-2015-12-05.
STANDARD = {
    # TorchScript: nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "inception-2015-12-05 (NVIDIA)",
    # A state dict: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's weights-inception-...
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "inception-2015-12-05",
}
_STEPS, _BATCH, _RATE = 300, 128, 2e-3  # training of a classifier, which takes seconds


class FeatureError(UserError):
    """A feature network that cannot be used."""

    on_all_ranks = True


class Features(NamedTuple):
    """Output of a feature network for N images; None for outputs that a network does not have.

    Attributes:
        pooled_ND: pooled features.
        spatial_NP: spatial features, flattened.
        probabilities_NK: class probabilities.
    """

    pooled_ND: Tensor
    spatial_NP: Tensor | None
    probabilities_NK: Tensor | None


@dataclass(frozen=True)
class Network:
    """A feature network, ready on its device.

    Attributes:
        name: name of the network, for the names of its metrics.
        standard: whether it is the standard Inception.
        declared: whether only the user has declared it as the standard Inception (the hash is unknown).
        sha256: hash of the file, or of the weights of a trained classifier.
        extract: uint8 images (N, C, H, W) -> Features.
        device: device of the network.
        shape: required shape (H, W, C) of the images; None: any.
    """

    name: str
    standard: bool
    declared: bool
    sha256: str
    extract: Callable[[Tensor], Features]
    device: torch.device
    shape: tuple[int, int, int] | None = None

    @torch.no_grad()
    def __call__(self, images_BHWC: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C), float32 and flattened to (N, D)."""
        pooled, spatial, probabilities = self.extract(images_BHWC.permute(0, 3, 1, 2).to(self.device))
        flat = [None if x is None else x.flatten(1).float() for x in (spatial, probabilities)]
        return Features(pooled.flatten(1).float(), *flat)

    def title(self, standard: str, other: str) -> str:
        """The name of a metric: `standard` for the standard network, otherwise `other` with the name of the network."""
        return standard if self.standard else f"{other} ({self.name})"


def open_network(
    name: str, device: torch.device | str, sha256: str | None = None, declared_standard: bool = False
) -> Network:
    """Opens a feature network.

    A TorchScript network is called with uint8 images (N, 3, H, W). It returns features (N, D), or a tuple (features,
    spatial features (N, ...), class probabilities (N, K)), of which the last or the last two can be missing.

    Args:
        name: one of `CLASSIFIERS`, which is trained now; or the path of a file: the standard Inception, recognised by
            its hash; another state dict of that network (.safetensors, .pth); or TorchScript. Loading TorchScript runs
            code of its author, so it needs `sha256` unless its hash is known.
        device: device of the network.
        sha256: the required hash of the file.
        declared_standard: the user declares that an unknown file contains the weights of the standard network.

    Raises FeatureError.
    """
    device = torch.device(device)
    if name in CLASSIFIERS:
        if sha256 is not None or declared_standard:
            raise FeatureError(
                f"features = {name!r}: is a classifier that is trained now, neither a file with a hash nor the standard"
                " network; leave --sha256 and the declaration out"
            )
        return train_classifier(name, device)
    file = Path(name)
    if not file.is_file():
        raise FeatureError(f"features = {name!r}: no such file, and none of {', '.join(CLASSIFIERS)}")
    digest = sha256_of(file)
    if sha256 is not None and sha256.lower() != digest:
        raise FeatureError(f"{file}: its sha256 is {digest}, not {sha256}; download the file again from its source")
    known = STANDARD.get(digest)
    identity = (known or file.stem, known is not None or declared_standard, known is None and declared_standard, digest)
    if file.suffix != ".safetensors" and _is_program(file):
        if known is None and sha256 is None:
            raise FeatureError(
                f"{file}: is TorchScript with an unknown hash, and loading it runs its code; if you trust its"
                f" source, give --sha256 {digest}"
            )
        return Network(*identity, _scripted(file, device), device)
    return Network(*identity, _inception(file, device), device)


def _is_program(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # maybe an old .pth; reading the weights raises if it is none


def _scripted(file: Path, device: torch.device) -> Callable[[Tensor], Features]:
    try:
        program = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise FeatureError(f"{file}: is no TorchScript that this torch reads ({str(error).splitlines()[0]})") from error
    names = {argument.name for argument in program.forward.schema.arguments}

    def extract(images: Tensor) -> Features:
        images = _three_channels(images)
        try:
            if {"return_features", "no_output_bias"} <= names:  # NVIDIA's network; the published score omits the bias
                return Features(program(images, return_features=True), None, program(images, no_output_bias=True))
            outputs = program(images)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise FeatureError(f"{file}: fails on uint8 images {tuple(images.shape)} ({reason})") from error
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        if not 1 <= len(outputs) <= 3 or not all(isinstance(x, Tensor) and len(x) == len(images) for x in outputs):
            raise FeatureError(f"{file}: must return features (N, D), or (features, spatial, probabilities)")
        return Features(*outputs, *[None] * (3 - len(outputs)))

    return extract


def _inception(file: Path, device: torch.device) -> Callable[[Tensor], Features]:
    try:
        # weights_only: unpickling can run arbitrary code
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise FeatureError(f"{file}: contains no weights that can be read ({reason}); give another file") from error
    network = Inception()
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # unused, and missing in some files
    if not isinstance(state, dict) or set(expected) - counters - set(state) or set(state) - set(expected):
        differing = sorted(set(expected) - counters ^ set(state) - counters)[:3] if isinstance(state, dict) else []
        raise FeatureError(f"{file}: are not the weights of this Inception ({', '.join(differing) or 'no names'} ...)")
    if wrong := [n for n in state if n not in counters and state[n].shape != expected[n].shape]:
        raise FeatureError(
            f"{file}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(expected[wrong[0]].shape)}"
        )
    network.load_state_dict(state, strict=False)
    network.eval().to(device)
    return lambda images: Features(*network(_three_channels(images)))


def _three_channels(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.expand(-1, 3, -1, -1) if images_BCHW.shape[1] == 1 else images_BCHW


class Classifier(nn.Module):
    """A small convolutional classifier with pooled features (N, 64), spatial features (N, 7·4·4) and probabilities."""

    def __init__(self, side: int, channels: int, classes: int):
        super().__init__()
        first = max(1, side // 16)
        self.low = nn.Sequential(
            *(nn.Conv2d(channels, 24, 3, stride=first, padding=1), nn.ReLU()),
            *(nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.high = nn.Sequential(
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images_BCHW: Tensor) -> Features:
        low = self.low(images_BCHW.to(self.head.weight.dtype) / 127.5 - 1)
        pooled = self.high(low).mean((2, 3))
        spatial = nn.functional.adaptive_avg_pool2d(low[:, :7], 4)
        return Features(pooled, spatial, self.head(pooled).softmax(1))

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Class logits (N, K), for training."""
        return self.head(self.high(self.low(images_BCHW / 127.5 - 1)).mean((2, 3)))


def train_classifier(name: str, device: torch.device, seed: int = 0) -> Network:
    """Trains the classifier of a built-in data set on its images. Bitwise reproducible on the same machine.

    Trained with one CPU thread, because the order of sums depends on the number of threads.
    """
    try:
        real = open_pixels(name)
    except ImageSetError as error:
        raise FeatureError(f"features = {name!r}: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    network = Classifier(real.shape[0], real.shape[2], real.num_classes)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_STEPS):
            chosen = torch.randint(len(real), (_BATCH,), generator=generator).sort().values
            images = torch.from_numpy(real.at(chosen.numpy())).permute(0, 3, 1, 2).float()
            loss = nn.functional.cross_entropy(network.logits(images), torch.from_numpy(real.labels[chosen.numpy()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.numpy().tobytes())
    network.eval().requires_grad_(False).to(device)
    return Network(f"{name} classifier", False, False, digest.hexdigest(), network, device, real.shape)
