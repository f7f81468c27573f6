"""Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 x 28 gray, ten classes.

The four files are those of the Debian package `dataset-fashion-mnist`, or a download of the original ones.
Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747; github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from megapromoe.data.datasets import ArrayDataset, DatasetError

PACKAGE = "dataset-fashion-mnist"
FOLDER = "/usr/share/datasets/fashion-mnist"  # where the package installs its files
_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8  # the code of this type in the header of an idx file


class FashionMNIST(ArrayDataset):
    """Fashion-MNIST as 1 x 32 x 32 images with values in [-1, 1].

    The 28 x 28 images are padded with background, so that the side divides by common patch sizes.

    Args:
        split: "train" or "test".
        folder: folder of the four idx files, gzipped or not; "": that of the Debian package.

    Raises:
        DatasetError: a file is missing or invalid.
    """

    shape = (1, 32, 32)
    num_classes = 10
    class_names = (
        *("T-shirt", "trousers", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )

    def __init__(self, split: str = "train", folder: str | Path = ""):
        folder, prefix = Path(folder or FOLDER), _PREFIX[split]
        images_file, images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels_file, labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise DatasetError(
                f"{images_file} holds {len(images)} images of {images.shape[1:]}, {labels_file} holds {len(labels)}"
                " labels: images must be 28 x 28, with one label each; download the files again"
            )
        self.images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, 1, 32, 32) float32 and labels (B) int64."""
        return self.images[indices_B] / np.float32(127.5) - np.float32(1), self.labels[indices_B]


def _read_idx(folder: Path, name: str, dimensions: int) -> tuple[Path, np.ndarray]:
    """Reads the idx file `name` or `name`.gz; returns its path and its uint8 array."""
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise DatasetError(
            f"data.source = 'fashion_mnist': {folder} holds no {name}.gz; install the Debian package {PACKAGE}"
            f" (apt-get install {PACKAGE}), or set data.path to a folder with the four idx files"
        )
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file} cannot be read: {error}; download it again") from error
    # Header: two zero bytes, the type, the number of dimensions, then the dimensions, big-endian int32.
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header], ">u4").astype(int)) if len(content) >= header else ()
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)) or len(content) != header + np.prod(shape):
        raise DatasetError(f"{file} is not an idx file of bytes in {dimensions} dimensions; download it again")
    return file, np.frombuffer(content, np.uint8, offset=header).reshape(shape)
