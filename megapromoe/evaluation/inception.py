"""The Inception network for FID, sFID and the Inception score: TensorFlow's graph of 2015-12-05.

The weights are not part of this package. The parameters have the names of the state dict that pytorch-fid and
torch-fidelity publish (`pt_inception-2015-12-05-6726825d.pth`), which are those of torchvision.

Differences from torchvision's Inception v3: average pooling does not count the padding, the last block uses max
pooling, and images are resized as in TensorFlow 1. Source: Szegedy et al. 2015 (arXiv
1512.00567); guided-diffusion's evaluator for the layers of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of mixed_6 (torchvision: Mixed_6d), 17 x 17 each; its first channels are the 1x1 branch

# Convolutions of a block, branch by branch: (name, channels, kernel, stride). A list at the end of a branch is a fork.
# Convolutions with stride 2 have no padding; others have padding that keeps the size.
_Conv = tuple[str, int, tuple[int, int], int]


def _conv(name: str, channels: int, height: int = 1, width: int | None = None, stride: int = 1) -> _Conv:
    return name, channels, (height, height if width is None else width), stride


def _block_a(pool: int) -> tuple[list, str]:
    return [
        [_conv("branch1x1", 64)],
        [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)],
        [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)],
        [_conv("branch_pool", pool)],
    ], "average"


def _block_b() -> tuple[list, str]:
    return [
        [_conv("branch3x3", 384, 3, stride=2)],
        [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, stride=2)],
    ], "shrink"


def _block_c(inner: int) -> tuple[list, str]:
    return [
        [_conv("branch1x1", 192)],
        [_conv("branch7x7_1", inner), _conv("branch7x7_2", inner, 1, 7), _conv("branch7x7_3", 192, 7, 1)],
        [
            _conv("branch7x7dbl_1", inner),
            _conv("branch7x7dbl_2", inner, 7, 1),
            _conv("branch7x7dbl_3", inner, 1, 7),
            _conv("branch7x7dbl_4", inner, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ],
        [_conv("branch_pool", 192)],
    ], "average"


def _block_d() -> tuple[list, str]:
    return [
        [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)],
        [
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, 1, 7),
            _conv("branch7x7x3_3", 192, 7, 1),
            _conv("branch7x7x3_4", 192, 3, stride=2),
        ],
    ], "shrink"


def _block_e(pool: str) -> tuple[list, str]:
    return [
        [_conv("branch1x1", 320)],
        [_conv("branch3x3_1", 384), [_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)]],
        [
            _conv("branch3x3dbl_1", 448),
            _conv("branch3x3dbl_2", 384, 3),
            [_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)],
        ],
        [_conv("branch_pool", 192)],
    ], pool


class Unit(nn.Module):
    """Convolution, batch normalisation with stored statistics, ReLU."""

    def __init__(self, d_in: int, d_out: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(d_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Parallel branches with concatenated channels. The pool is the input of the last branch; "shrink": a branch."""

    def __init__(self, channels: int, branches: list, pool: str):
        super().__init__()
        self.pool = pool
        self.paths: list[tuple[list[str], list[str]]] = []  # names of the chain, names of the fork
        self.channels = channels if pool == "shrink" else 0
        for branch in branches:
            fork = branch[-1] if isinstance(branch[-1], list) else []
            chain = branch[: len(branch) - bool(fork)]
            width = channels
            for name, d_out, kernel, stride in chain:
                self.add_module(name, Unit(width, d_out, kernel, stride, pad=stride == 1))
                width = d_out
            for name, d_out, kernel, stride in fork:
                self.add_module(name, Unit(width, d_out, kernel, stride))
            self.paths.append(([unit[0] for unit in chain], [unit[0] for unit in fork]))
            self.channels += sum(unit[1] for unit in fork) or width

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain, fork in self.paths:
            y = self._pooled(x) if chain[0] == "branch_pool" else x
            for name in chain:
                y = self.get_submodule(name)(y)
            out += [self.get_submodule(name)(y) for name in fork] or [y]
        return torch.cat(out + ([F.max_pool2d(x, 3, 2)] if self.pool == "shrink" else []), 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, 1, padding=1)
        return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


class Inception(nn.Module):
    """uint8 images (N, 3, H, W) -> features (N, 2048), spatial features (N, 2023), probabilities (N, 1008)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), pad=False)
        blocks = {
            **{"Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64), "Mixed_6a": _block_b()},
            **{"Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160)},
            **{"Mixed_6e": _block_c(192), "Mixed_7a": _block_d()},
            **{"Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("maximum")},
        }
        channels = 192
        for name, (branches, pool) in blocks.items():
            block = Block(channels, branches, pool)
            self.add_module(name, block)
            channels = block.channels
        self.blocks = list(blocks)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize(images_BCHW.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        spatial = x
        for name in self.blocks:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                # Channels last, as in TensorFlow.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        features = x.mean((2, 3))
        # The published score omits the bias.
        return features, spatial, F.linear(features, self.fc.weight).softmax(1)


def resize(images_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear resize to (B, C, side, side) as in TensorFlow 1: pixel i samples i · size / side, no half pixel."""
    for dim in (2, 3):
        size = images_BCHW.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=images_BCHW.device) * (size / side)
        low = place.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        part = (place - low).view([-1, 1] if dim == 2 else [-1]).to(images_BCHW.dtype)
        a, b = images_BCHW.index_select(dim, low), images_BCHW.index_select(dim, high)
        images_BCHW = a + (b - a) * part
    return images_BCHW
