"""Networks that look at images for evaluation: the standard Inception, any TorchScript, or a classifier made here.

Only the standard Inception makes figures that may be called FID, sFID and Inception score; the other networks' bear
their name. A network is called with uint8 images (N, C, H, W) and returns `Features`.
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

# The standard network, TensorFlow's inception-2015-12-05, in the files it is published in.
STANDARD = {
    # TorchScript: nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "inception-2015-12-05 (NVIDIA)",
    # A state: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's weights-inception-... of that name
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "inception-2015-12-05",
}
_STEPS, _BATCH, _RATE = 300, 128, 2e-3  # of a classifier's training: a second for digits, some for Fashion-MNIST


class FeatureError(UserError):
    """A feature network that cannot be used."""

    on_all_ranks = True


class Features(NamedTuple):
    """What a network makes of N images; it need not have all."""

    pooled_ND: Tensor
    spatial_NP: Tensor | None
    probabilities_NK: Tensor | None


@dataclass(frozen=True)
class Network:
    """A feature network, ready on its device.

    Attributes:
        name: by which its figures are called.
        standard: whether it is the network of FID.
        declared: that it is, by the user's word alone.
        sha256: of the file, or of a trained classifier's weights.
        extract: uint8 images (N, C, H, W) -> Features.
        shape: (H, W, C) of the only images that it takes; None: any.
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
        """Features of uint8 images (N, H, W, C)."""
        pooled, spatial, probabilities = self.extract(images_BHWC.permute(0, 3, 1, 2).to(self.device))
        flat = [None if x is None else x.flatten(1).float() for x in (spatial, probabilities)]
        return Features(pooled.flatten(1).float(), *flat)

    def title(self, standard: str, other: str) -> str:
        """The name of a figure: `standard` for the standard network only, else `other` and the network's name."""
        return standard if self.standard else f"{other} ({self.name})"


def open_network(
    name: str, device: torch.device | str, sha256: str | None = None, declared_standard: bool = False
) -> Network:
    """The feature network of this name.

    Args:
        name: one of `CLASSIFIERS`, a classifier that is trained here and now; or the path of a file: the standard
            Inception, known by its hash; another state of that network (.safetensors, .pth); or TorchScript. That is
            a program: to load it is to run what its author wrote, hence only with its `sha256`, or a known one.
        sha256: the hash that the file must have.
        declared_standard: the user says that an unknown file holds the standard network's weights.

    TorchScript gets uint8 (N, 3, H, W) and returns features (N, D), or a tuple of those, spatial features (N, ...) and
    class probabilities (N, K), the latter two or the last left out.

    Raises FeatureError.
    """
    device = torch.device(device)
    if name in CLASSIFIERS:
        if sha256 is not None or declared_standard:
            raise FeatureError(
                f"features = {name!r}: is made here, no file with a hash, and never the standard network"
            )
        return train_classifier(name, device)
    file = Path(name)
    if not file.is_file():
        raise FeatureError(f"features = {name!r}: no such file, and none of {', '.join(CLASSIFIERS)}")
    digest = sha256_of(file)
    if sha256 is not None and sha256.lower() != digest:
        raise FeatureError(f"{file}: its sha256 is {digest}, not {sha256}; fetch it again, or from its author")
    known = STANDARD.get(digest)
    facts = (known or file.stem, known is not None or declared_standard, known is None and declared_standard, digest)
    if file.suffix != ".safetensors" and _is_program(file):
        if known is None and sha256 is None:
            raise FeatureError(
                f"{file}: is TorchScript, a program that runs when it is loaded, and not a known one; if you trust"
                f" where it is from, say so by --sha256 {digest}"
            )
        return Network(*facts, _scripted(file, device), device)
    return Network(*facts, _inception(file, device), device)


def _is_program(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # an old .pth; what is no file of weights at all is found when it is read


def _scripted(file: Path, device: torch.device) -> Callable[[Tensor], Features]:
    try:
        program = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise FeatureError(f"{file}: is no TorchScript that this torch reads ({str(error).splitlines()[0]})") from error
    names = {argument.name for argument in program.forward.schema.arguments}

    def extract(images: Tensor) -> Features:
        images = _three_channels(images)
        try:
            if {"return_features", "no_output_bias"} <= names:  # NVIDIA's; the published score leaves the bias out
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
        # weights_only: a pickle could run what a stranger put in it
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise FeatureError(f"{file}: holds no weights that can be read ({reason}); give another file") from error
    network = Inception()
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # unused, and often left out
    if not isinstance(state, dict) or set(expected) - counters - set(state) or set(state) - set(expected):
        apart = sorted(set(expected) - counters ^ set(state) - counters)[:3] if isinstance(state, dict) else []
        raise FeatureError(f"{file}: are not the weights of this Inception ({', '.join(apart) or 'no names'} ...)")
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
    """A small convolutional classifier: pooled features (N, 64), spatial ones (N, 7·4·4), class probabilities."""

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
        """Before the softmax, for training."""
        return self.head(self.high(self.low(images_BCHW / 127.5 - 1)).mean((2, 3)))


def train_classifier(name: str, device: torch.device, seed: int = 0) -> Network:
    """The classifier of a built-in data set, trained on its real images: the same bits each time on one machine.

    One thread of the CPU trains it: the order of a sum over several would depend on their number.
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
