"""The reference of an evaluation: real images or statistics of their features, and whether they are comparable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megapromoe.config.options import Config
from megapromoe.errors import UserError
from megapromoe.evaluation.features import Network
from megapromoe.evaluation.names import DATA
from megapromoe.evaluation.pixels import BUILT_IN, data_of_run, open_pixels
from megapromoe.evaluation.statistics import NEIGHBOURS, Normal
from megapromoe.sampling.image_sets import ImageSet, entries, open_array

_STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # entries of guided-diffusion's files
_LARGEST = 1e30  # limit for their values; squares stay far below the largest float64
_ASYMMETRY = 1e-3  # tolerated asymmetry of a covariance relative to its largest entry; float32 rounding is far smaller


class EvaluationError(UserError):
    """An evaluation that is not possible as requested."""

    on_all_ranks = True


class Images(Protocol):
    """Images that a feature network can be applied to."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (B, H, W, C)."""


@dataclass(frozen=True)
class Reference:
    """Real images, or statistics of their features.

    Attributes:
        name: name for records and messages.
        images: the images; None if a file contains only statistics.
        statistics: "pooled" and "spatial" distributions from a file; they are used instead of those of the images.
    """

    name: str
    images: Images | None
    statistics: Mapping[str, Normal]

    def check_comparable(
        self, network: Network, shape: tuple[int, int, int] | None, count: int, remedy: str = "{} images"
    ) -> None:
        """Raises EvaluationError unless `count` images of a shape can be compared with the reference by the network.

        Args:
            shape: (H, W, C) of the images; None: unknown.
            count: number of images.
            remedy: how to get more images; {} is replaced by their number.
        """
        problems = []
        real = None if self.images is None else self.images.shape
        known = [s for s in (shape, real) if s]
        if shape and real and shape != real:
            problems.append(f"the images are {_size(shape)}, the reference {_size(real)}: compare images of one size")
        if network.shape and (wrong := [s for s in known if s != network.shape]):
            expected = f"images of {_size(network.shape)}, not {_size(wrong[0])}"
            problems.append(f"features = {network.name}: takes {expected}")
        if known and not problems:
            problems = self._count_problems(network, known[0], count, remedy)
        if problems:
            raise EvaluationError("; ".join(problems))

    def _count_problems(self, network: Network, shape: tuple[int, int, int], count: int, remedy: str) -> list[str]:
        problems = []
        features = network(torch.zeros(1, *shape, dtype=torch.uint8))
        kinds = {"pooled": features.pooled_ND, "spatial": features.spatial_NP}
        dims = {kind: x.shape[1] for kind, x in kinds.items() if x is not None}
        if wrong := [k for k, dim in dims.items() if k in self.statistics and len(self.statistics[k].mean) != dim]:
            problems.append(f"reference = {self.name}: its {wrong[0]} statistics are not of {network.name}")
        most = max(dims.values())
        if count <= most:
            more = remedy.format(most + 1)
            problems.append(
                f"{count} images are too few for the covariance of {most} features of {network.name}; use {more}"
                " or more"
            )
        if self.images is None:
            return problems
        real, needed = len(self.images), max((d for k, d in dims.items() if k not in self.statistics), default=0)
        if real <= needed:
            problems.append(
                f"reference = {self.name}: {real} images are too few for the covariance of {needed}"
                f" features; {needed + 1} are needed at least"
            )
        if not problems and min(count, real) <= NEIGHBOURS:
            problems.append(
                f"{count} images against {real}: precision and recall need {NEIGHBOURS + 1} of each at least"
            )
        return problems


def open_reference(name: str, split: str, config: Config | None, network: Network) -> Reference:
    """Opens a reference.

    Args:
        name: "data" (the training data of the run), a built-in data set, an .npz in the layout of guided-diffusion, or
            a folder of pictures. Statistics in an .npz are used with the standard network only.
        split: split of a data set, "train" or "test".
        config: config of the run; None: there is no run.
        network: the feature network.

    Raises EvaluationError or ImageSetError.
    """
    if name == DATA:
        if config is None:
            raise EvaluationError(
                "reference = data: is the training data of a run, and no run is given; give a file, a folder or a data"
                " set's name"
            )
        pixels = data_of_run(config, split)
        return Reference(pixels.name, pixels, {})
    if name in BUILT_IN:
        pixels = open_pixels(name, split)
        return Reference(pixels.name, pixels, {})
    path = Path(name)
    if split != "train":
        raise EvaluationError(f"split = {split}: only data sets have splits, not {name}")
    if path.is_dir():
        return Reference(name, ImageSet(path), {})
    if not path.is_file():
        raise EvaluationError(
            f"reference = {name!r}: no such file or folder, and none of {', '.join((DATA, *BUILT_IN))}"
        )
    names = entries(path)
    statistics = {}
    for kind, (mean, covariance) in _STATISTICS.items():
        if network.standard and {mean, covariance} <= names:
            statistics[kind] = _normal(path, mean, covariance)
    if "arr_0" in names:
        return Reference(name, ImageSet(path), statistics)
    if "pooled" not in statistics:
        raise EvaluationError(
            f"reference = {name}: contains {', '.join(sorted(names))}; images (arr_0) are needed, or mu and sigma with"
            " the standard network"
        )
    return Reference(name, None, statistics)


def check_finite(figures: Mapping[str, float], network: Network) -> None:
    """Raises EvaluationError if a metric is not finite."""
    if wrong := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise EvaluationError(
            f"features = {network.name}: {wrong[0]} is {figures[wrong[0]]}, so the network does not return class"
            " probabilities, or its features cannot be compared; use another network"
        )


def _normal(path: Path, mean: str, covariance: str) -> Normal:
    """Reads a normal distribution from two arrays of an .npz. Raises EvaluationError if they are not valid."""
    mean_D, covariance_DD = (np.asarray(open_array(path, name)) for name in (mean, covariance))
    arrays, problem = {mean: mean_D, covariance: covariance_DD}, ""
    wrong = [name for name, array in arrays.items() if array.dtype.kind not in "fiu"]
    if wrong:
        problem = f"{wrong[0]} holds {arrays[wrong[0]].dtype} values, not real numbers"
    elif mean_D.ndim != 1 or not mean_D.size or covariance_DD.shape != 2 * mean_D.shape:
        shapes = f"{mean} {mean_D.shape}, {covariance} {covariance_DD.shape}"
        problem = f"{shapes}: a mean has the shape (D,), its covariance (D, D), D the number of features"
    elif wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        count = int((~np.isfinite(arrays[wrong[0]])).sum())
        problem = f"{count:,} of the {arrays[wrong[0]].size:,} values of {wrong[0]} are not finite"
    elif wrong := [name for name, array in arrays.items() if np.abs(array).max() > _LARGEST]:
        problem = f"{wrong[0]} has values up to {np.abs(arrays[wrong[0]]).max():.3g}, which features do not have"
    if not problem:
        mean_D, covariance_DD = mean_D.astype(np.float64), covariance_DD.astype(np.float64)
        largest = np.abs(covariance_DD).max()
        if np.abs(covariance_DD - covariance_DD.T).max() > _ASYMMETRY * largest:
            problem = f"{covariance} is not symmetric, so it is not a covariance"
        elif covariance_DD.diagonal().min() < -_ASYMMETRY * largest:
            problem = f"{covariance} has a variance below 0, so it is not a covariance"
        else:
            return Normal(torch.from_numpy(mean_D), torch.from_numpy(covariance_DD), count=0)
    raise EvaluationError(f"reference = {path}: {problem}; compute the statistics again, or give the images")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
