"""The protocol of data sets, and two data sets without files: 8x8 digits and synthetic latents of any shape."""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from megapromoe.config.model_options import ModelConfig
from megapromoe.data.digits_file import read_digits
from megapromoe.diffusion import noise
from megapromoe.errors import UserError


class Dataset(Protocol):
    """A finite set of labelled images or latents, addressed by index."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one record."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 to num_classes - 1."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class."""

    @property
    def labels(self) -> np.ndarray:
        """The class of every record, int64 (N,)."""

    @property
    def stochastic(self) -> bool:
        """Whether a record is a normal distribution that is sampled; otherwise it is an array."""

    def __len__(self) -> int:
        """Number of records."""

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads images (B, C, H, W) float32 and labels (B,) int64, without mirroring; of distributions, the means."""

    def sample(self, indices_B: np.ndarray, mirror_B: np.ndarray, normal_BCHW: np.ndarray | None) -> np.ndarray:
        """Training samples (B, C, H, W) float32.

        Args:
            indices_B: record indices, int64 in [0, len).
            mirror_B: bool: which samples are mirrored left to right.
            normal_BCHW: unit normals for sampling a stochastic data set; None: the mean.

        Raises DamagedRecords, which lists all of these records that cannot be used.
        """


class DatasetError(UserError):
    """A data set does not fit the model, or holds invalid values."""


class DamagedRecords(DatasetError):
    """Some of the requested records cannot be used.

    Attributes:
        rows: their positions in the requested indices.
    """

    def __init__(self, rows: list[int], message: str):
        super().__init__(message)
        self.rows = rows


class ArrayDataset(ABC):
    """A data set whose records are arrays: `sample` mirrors the arrays of `read`."""

    stochastic = False

    @abstractmethod
    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, C, H, W) float32 and labels (B,) int64."""

    def sample(self, indices_B: np.ndarray, mirror_B: np.ndarray, normal_BCHW: np.ndarray | None) -> np.ndarray:
        """Images (B, C, H, W) float32; see `Dataset.sample`."""
        images_BCHW, _ = self.read(indices_B)
        if not mirror_B.any():
            return images_BCHW
        return np.where(mirror_B[:, None, None, None], images_BCHW[..., ::-1], images_BCHW)


def check_dataset(dataset: Dataset, model: ModelConfig) -> None:
    """Checks that a model of this configuration can train on the data set.

    Raises:
        DatasetError: lists every mismatch, and the first record whose label is out of range.
    """
    problems = []
    shape = (model.in_channels, model.input_size, model.input_size)
    if tuple(dataset.shape) != shape:
        problems.append(
            f"records have shape {tuple(dataset.shape)}, the model takes {shape}: "
            f"set model.in_channels={dataset.shape[0]} and model.input_size={dataset.shape[1]}"
        )
    if not model.has_text and dataset.num_classes != model.num_classes:
        problems.append(
            f"{dataset.num_classes} classes, the model has {model.num_classes}: "
            f"set model.num_classes={dataset.num_classes}"
        )
    if len(dataset) == 0:
        problems.append("no records: at least one is needed")
    labels = np.asarray(dataset.labels)
    if len(labels) != len(dataset):
        problems.append(f"{len(labels)} labels for {len(dataset)} records: one label a record is needed")
    wrong = np.flatnonzero((labels < 0) | (labels >= model.num_classes))
    if len(wrong) and not model.has_text:
        problems.append(
            f"record {wrong[0]} has label {labels[wrong[0]]}, labels must be in 0..{model.num_classes - 1} "
            f"({len(wrong)} of {len(labels)} records are out of range): "
            "correct the label or raise model.num_classes"
        )
    if problems:
        raise DatasetError(f"data set {type(dataset).__name__}: " + "; ".join(problems))


class Digits(ArrayDataset):
    """The 1,797 handwritten digits that come with scikit-learn: 1 x 8 x 8, ten classes, values in [-1, 1]."""

    shape = (1, 8, 8)
    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self) -> None:
        images, self.labels = read_digits()
        self.images = (images[:, None] / 8 - 1).astype(np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, 1, 8, 8) float32 and labels (B) int64."""
        return self.images[indices_B], self.labels[indices_B]


class Synthetic(ArrayDataset):
    """Synthetic latents of any shape: unit normal noise plus a mean pattern of the class, which a model can learn.

    A record is computed from (seed, index) when it is read. Record i has class i mod num_classes.

    Args:
        shape: (C, H, W) of a latent.
        num_classes: number of classes, each with its own unit-normal mean pattern.
        size: number of records.
        seed: seed of the patterns and records.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, size: int, seed: int):
        self.shape = shape
        self.num_classes = num_classes
        self.class_names = tuple(f"class {label}" for label in range(num_classes))
        self.labels = np.arange(size, dtype=np.int64) % num_classes
        self.seed = seed
        self.means = noise.normals(seed, "synthetic class", np.arange(num_classes), self.shape)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents (B, C, H, W) float32 and labels (B) int64."""
        labels = self.labels[indices_B]
        return self.means[labels] + noise.normals(self.seed, "synthetic record", indices_B, self.shape), labels
