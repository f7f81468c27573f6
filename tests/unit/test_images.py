"""Images: the crop against its definition, every mode, and the scan of a folder of classes."""

import os

import numpy as np
import pytest
from PIL import Image

from megapromoe.data.images import ImageError, Item, centre_crop, read_image, scan


def resampled(array, size, kernel, support):
    """One axis (the first) of an image, scaled by the definition of filtered resampling, rounded to bytes."""
    scale = len(array) / size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, len(array)))
    for i in range(size):
        centre = (i + 0.5) * scale
        for j in range(len(array)):
            distance = (j + 0.5 - centre) / stretch
            weights[i, j] = kernel(distance) if abs(distance) <= support else 0
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ij,j...->i...", weights, array.astype(float)).round().clip(0, 255)


def box(x):
    return float(-0.5 < x <= 0.5)


def cubic(x, a=-0.5):
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def adm_crop(array, side):
    """The crop from its description: halve while the short side stays at least 2 * side, scale, cut."""

    def resize(image, height, width, kernel, support):
        across = resampled(image.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2)
        return resampled(across, height, kernel, support)

    while min(array.shape[:2]) >= 2 * side:
        array = resize(array, array.shape[0] // 2, array.shape[1] // 2, box, 0.5)
    scale = side / min(array.shape[:2])
    array = resize(array, round(array.shape[0] * scale), round(array.shape[1] * scale), cubic, 2)
    top, left = ((length - side) // 2 for length in array.shape[:2])
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("height, width", [(16, 16), (39, 63), (150, 67), (9, 12), (64, 64), (35, 131)])
def test_the_crop_is_the_one_of_its_definition(height, width):
    smooth = np.random.default_rng(1).random((4, 4, 3)) * 255
    pixels = np.asarray(Image.fromarray(smooth.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
    found = np.asarray(centre_crop(Image.fromarray(pixels), 16), float)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - adm_crop(pixels, 16)).max() <= 2  # each of Pillow's passes rounds its weights too


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_three_channels_or_one(mode, tmp_path):
    gray = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (24, 1))
    if mode.startswith("I"):
        image = Image.fromarray(gray.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr", "I") else "image.png")
    image.save(path)
    color, single = read_image(path, 24), read_image(path, 24, channels=1)
    assert color.shape == (3, 24, 24) and single.shape == (1, 24, 24) and color.dtype == np.uint8
    if mode != "1":
        assert np.abs(color.astype(int) - gray).max() <= 4 and np.abs(single[0].astype(int) - gray).max() <= 4


def test_what_is_no_image_is_told_with_the_reason(images):
    with pytest.raises(ImageError, match="truncated"):
        read_image(images / "class1" / "cut.png", 8)
    with pytest.raises(ImageError, match="UnidentifiedImageError: cannot identify image file 'text.jpg'"):
        read_image(images / "class2" / "text.jpg", 8)
    with pytest.raises(ImageError, match="FileNotFoundError"):
        read_image(images / "none.png", 8)


def test_scan_takes_all_ends_and_depths_in_one_order(images):
    found = scan(images)
    assert found.class_names == ("class0", "class1", "class2") and len(found.items) == 16
    assert [item.path for item in found.items] == sorted(item.path for item in found.items)
    assert Item("class1/deep/er/im01.JPEG", 1) in found.items and Item("class0/deep/er/im03.Gif", 0) in found.items
    assert found.skipped == (("class2/notes.txt", "no image by its name"),)
    os.symlink(images, images / "class0" / "loop")
    assert len(scan(images).items) == 16
    os.symlink(images / "class1" / "deep", images / "class3")  # a class elsewhere
    assert len(scan(images).class_names) == 4


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, images):
    with pytest.raises(ImageError, match="no such folder"):
        scan(tmp_path / "nothing")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ImageError, match="none of its 0 files is an image"):
        scan(tmp_path / "empty")
    with pytest.raises(ImageError, match="one class, 'er'; give the folder above"):
        scan(images / "class0" / "deep")
    assert {item.label for item in scan(images / "class0", one_class=True).items} == {0}
    (images / "void").mkdir()
    (images / "class0" / "im00.png").rename(images / "loose.png")
    with pytest.raises(ImageError, match="1 images, such as loose.png, .*; 1 class folders without .*'void'"):
        scan(images)
