"""The handwritten digits are those that scikit-learn loads."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from megapromoe.data import digits_file
from megapromoe.data.digits_file import read_digits


@pytest.mark.parametrize("kept", ["where it is", "elsewhere"])
def test_digits_are_those_of_scikit_learn(kept, monkeypatch):
    """Also those of a version that keeps its file elsewhere."""
    if kept == "elsewhere":
        monkeypatch.setattr(digits_file.Path, "is_file", lambda path: False)
    images, labels = read_digits()
    expected = load_digits()
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)
    assert images.shape == (1797, 8, 8) and images.dtype == np.float64 and labels.dtype == np.int64


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(digits_file, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        read_digits()
    assert caught.value.name == "sklearn"
