"""Real images for evaluation, uint8, from a data set of pixels."""

from __future__ import annotations

import numpy as np

from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset, DatasetError, Digits
from megapromoe.data.fashion import FashionMNIST
from megapromoe.data.sources import autoencoder_identity, open_dataset
from megapromoe.diffusion.image_grid import to_bytes
from megapromoe.sampling.image_sets import ImageSetError

BUILT_IN = ("digits", "fashion_mnist")


class Pixels:
    """A data set of pixels with the interface of `ImageSet`."""

    def __init__(self, name: str, dataset: Dataset):
        self.name, self._dataset = name, dataset
        channels, height, width = dataset.shape
        self.shape = (height, width, channels)
        self.labels, self.num_classes = dataset.labels, dataset.num_classes

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads images start .. stop - 1, uint8 (B, H, W, C). Raises ImageSetError if one is damaged."""
        return self.at(np.arange(start, min(stop, len(self))))

    def at(self, indices: np.ndarray) -> np.ndarray:
        """Reads images with these indices (B,), uint8 (B, H, W, C). Raises ImageSetError."""
        try:
            return to_bytes(self._dataset.sample(indices, np.zeros(len(indices), dtype=bool), None))
        except DatasetError as error:
            raise ImageSetError(str(error)) from error


def open_pixels(name: str, split: str = "train") -> Pixels:
    """Opens a built-in data set by name. Raises ImageSetError."""
    if name == "digits" and split == "test":
        raise ImageSetError("digits has no test split; leave --split out")
    try:
        dataset: Dataset = Digits() if name == "digits" else FashionMNIST(split)
    except DatasetError as error:
        raise ImageSetError(str(error)) from error
    return Pixels(name if split == "train" else f"{name} ({split})", dataset)


def data_of_run(config: Config, split: str = "train") -> Pixels:
    """Opens the training data of a run. Raises ImageSetError if they are not pixels."""
    source = config.data.source
    try:
        made_by = autoencoder_identity(config)
        if source not in BUILT_IN and (made_by is None or made_by["kind"] != "pixels"):
            raise ImageSetError(
                f"data.source = {source!r}: the run trains on latents, which cannot be compared with images; give"
                " --reference FILE.npz, or a folder of pictures"
            )
        return Pixels(source if split == "train" else f"{source} ({split})", open_dataset(config, split))
    except DatasetError as error:
        raise ImageSetError(str(error)) from error
