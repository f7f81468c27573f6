"""Sets of images: read from where they lie, and refused with the reason."""

import numpy as np
import pytest
from PIL import Image

from megapromoe.sampling.image_sets import ImageSet, ImageSetError, open_array


def test_an_npz_is_read_from_where_it_lies(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images, mu=np.arange(3.0))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    for name in ("plain", "packed"):
        opened = ImageSet(tmp_path / f"{name}.npz")
        assert (len(opened), opened.shape) == (7, (4, 4, 3))
        np.testing.assert_array_equal(opened.read(2, 6), images[2:6])
    assert isinstance(open_array(tmp_path / "plain.npz", "arr_0"), np.memmap)
    np.testing.assert_array_equal(open_array(tmp_path / "plain.npz", "mu"), np.arange(3.0))
    np.savez(tmp_path / "floats.npz", arr_0=images.astype(float))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, match in (("floats", "images are uint8"), ("objects", "pickle"), ("text", "no .npz archive")):
        with pytest.raises(ImageSetError, match=match):
            ImageSet(tmp_path / f"{name}.npz")
    with pytest.raises(ImageSetError, match="has no mu"):
        open_array(tmp_path / "packed.npz", "mu")


def test_a_folder_of_pictures_is_a_set(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((5, 4, 3), 10 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pictures = ImageSet(tmp_path)
    assert (len(pictures), pictures.shape) == (3, (5, 4, 3)) and pictures.read(1, 3)[:, 0, 0, 0].tolist() == [10, 20]
    Image.fromarray(np.zeros((5, 5, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(ImageSetError, match="3.png.*all must be alike"):
        pictures = ImageSet(tmp_path)
        pictures.read(2, 4)
    with pytest.raises(ImageSetError, match="4.png: cannot be read"):
        pictures.read(4, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageSetError, match="holds no picture"):
        ImageSet(tmp_path / "empty")
