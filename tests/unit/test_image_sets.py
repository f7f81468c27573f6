"""Sets of images: read from where they lie, and refused with the reason."""

import logging
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from megapromoe.data.images import SUFFIXES, ImageError, centre_crop, read_image
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSet, ImageSetError, open_array


def test_an_npz_is_memory_mapped_in_place(tmp_path):
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
    for name, match in (("floats", "images are uint8"), ("objects", "pickle"), ("text", "not an .npz archive")):
        with pytest.raises(ImageSetError, match=match):
            ImageSet(tmp_path / f"{name}.npz")
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:  # numpy ends in a tokenize.TokenError
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00\x06\x00{'a':(")
    with pytest.raises(ImageSetError, match="header.npz: arr_0 cannot be read .*write it again"):
        ImageSet(tmp_path / "header.npz")
    with pytest.raises(ImageSetError, match="has no mu"):
        open_array(tmp_path / "packed.npz", "mu")


def test_a_folder_of_pictures_is_a_set(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((5, 4, 3), 10 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pictures = ImageSet(tmp_path)
    assert (len(pictures), pictures.shape) == (3, (5, 4, 3)) and pictures.read(1, 3)[:, 0, 0, 0].tolist() == [10, 20]
    Image.fromarray(np.zeros((5, 5, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(ImageSetError, match="3.png.*all pictures must have the same shape"):
        pictures = ImageSet(tmp_path)
        pictures.read(2, 4)
    with pytest.raises(ImageSetError, match="4.png: cannot be read"):
        pictures.read(4, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageSetError, match="contains no picture"):
        ImageSet(tmp_path / "empty")


def test_pictures_of_a_set_are_read_as_encoding_reads_them(images, tmp_path):
    """Every mode, size, and way in which a file may be damaged: the same pixels, or the same reason."""
    gray = np.linspace(0, 65535, 20 * 20).reshape(20, 20)
    Image.fromarray(gray.astype(np.uint16)).save(images / "16_bits.png")
    Image.fromarray(gray.astype(np.uint16)).save(images / "16_bits.tif")
    Image.fromarray(gray.astype(np.float32)).save(images / "floats.tif")
    Image.new("LAB", (20, 20)).save(images / "lab.tif")
    Image.new("1", (20000, 10000)).save(images / "large.png")
    compared = {"read": 0, "refused": 0}
    for number, file in enumerate(sorted(f for f in images.rglob("*") if f.suffix.lower() in SUFFIXES)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / file.name).write_bytes(file.read_bytes())
        try:
            pictures = ImageSet(folder)
        except ImageSetError as error:
            with pytest.raises(ImageError) as reason:
                read_image(file, 20)
            assert str(error) == f"{folder / file.name}: cannot be read ({reason.value}); remove it, or write it again"
            compared["refused"] += 1
        else:
            pixels = pictures.read(0, 1)[0]
            cropped = np.asarray(centre_crop(Image.fromarray(pixels.squeeze()), 20)).reshape(20, 20, -1)
            np.testing.assert_array_equal(cropped.transpose(2, 0, 1), read_image(file, 20, pixels.shape[2]))
            compared["read"] += 1
    assert compared == {"read": 17, "refused": 4}


def test_16_bit_pictures_keep_their_grays(tmp_path):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "x.png")
    (pixels,) = ImageSet(tmp_path).read(0, 1)
    assert pixels.shape == (256, 256, 1) and (np.bincount(pixels.ravel(), minlength=256)[1:255] == 257).all()


def test_hidden_pictures_are_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megapromoe")
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"._{name}.png").write_bytes(b"AppleDouble")
    assert ImageSet(tmp_path).read(0, 2).shape == (2, 4, 4, 3)
    assert f"{tmp_path}: 2 hidden or system files and folders are ignored, such as ._a.png" in caplog.text


@pytest.mark.parametrize("out", ["set", "set.npz"])
def test_a_request_that_failed_before_its_first_image_does_not_hold_the_place(out, tmp_path):
    writer = ImageSetWriter(tmp_path / out, 4, 2, (8, 8, 1))
    assert writer.open({"steps": 2}) == [0, 1]
    writer.close()
    assert writer.open({"steps": 3}) == [0, 1], "the corrected request"
    writer.write(0, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ImageSetError, match="another process generates these images"):
        ImageSetWriter(tmp_path / out, 4, 2, (8, 8, 1)).open({"steps": 4})
    writer.close()
    with pytest.raises(ImageSetError, match="images of another request .steps: 3 stored, 4 requested"):
        writer.open({"steps": 4})
    writer.close()
    assert writer.open({"steps": 3}) == [1]
    writer.close()
