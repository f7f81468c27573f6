"""The file of scikit-learn's handwritten digits, read without importing scikit-learn, which takes a second."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8), integers 0 to 16 as float64, and their digits (1797) int64.

    Source: sklearn.datasets.load_digits (UCI optical recognition of handwritten digits, test part).

    Raises ModuleNotFoundError if scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
