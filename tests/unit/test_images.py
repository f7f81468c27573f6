"""Images: the crop against its definition, every mode, and the scan of a folder of classes."""

import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from megapromoe.data import images as reader
from megapromoe.data.images import MAX_PIXELS, ImageError, Item, centre_crop, open_image, read_image, scan


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
    result = np.asarray(centre_crop(Image.fromarray(pixels), 16), float)
    assert result.shape == (16, 16, 3)
    assert np.abs(result - adm_crop(pixels, 16)).max() <= 2  # each of Pillow's passes rounds its weights too


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


def test_a_file_that_is_no_image_is_refused_with_the_reason(images):
    with pytest.raises(ImageError, match="truncated"):
        read_image(images / "class1" / "cut.png", 8)
    with pytest.raises(ImageError, match="UnidentifiedImageError: cannot identify image file 'text.jpg'"):
        read_image(images / "class2" / "text.jpg", 8)
    with pytest.raises(ImageError, match="FileNotFoundError"):
        read_image(images / "none.png", 8)


def test_scan_takes_all_ends_and_depths_in_one_order(images):
    result = scan(images)
    assert result.class_names == ("class0", "class1", "class2") and len(result.items) == 16
    assert [item.path for item in result.items] == sorted(item.path for item in result.items)
    assert Item("class1/deep/er/im01.JPEG", 1) in result.items and Item("class0/deep/er/im03.Gif", 0) in result.items
    assert result.skipped == (("class2/notes.txt", "not the name of an image"),)
    os.symlink(images, images / "class0" / "loop")
    assert len(scan(images).items) == 16
    os.symlink(images / "class1" / "deep", images / "class3")  # a class elsewhere
    assert len(scan(images).class_names) == 4


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, images):
    with pytest.raises(ImageError, match="no such folder"):
        scan(tmp_path / "nothing")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ImageError, match="none of its 0 files has the name of an image"):
        scan(tmp_path / "empty")
    with pytest.raises(ImageError, match="one class, 'er'; give the parent folder"):
        scan(images / "class0" / "deep")
    assert {item.label for item in scan(images / "class0", one_class=True).items} == {0}
    (images / "void").mkdir()
    (images / "class0" / "im00.png").rename(images / "loose.png")
    with pytest.raises(ImageError, match="1 images, such as loose.png, .*; 1 class folders without .*'void'"):
        scan(images)


# ---- what is not the user's own, and the numbers of classes

SYSTEM = (".ipynb_checkpoints", ".snapshot", "__MACOSX", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN")


def test_hidden_and_system_folders_are_ignored_with_a_note(images):
    before = scan(images)
    assert before.notes == ()
    for name in SYSTEM:
        for folder in (images / name, images / name / "class0", images / "class1" / "deep" / name):
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(folder / "copy.png")
    (images / ".empty").mkdir()
    (images / "class2" / "._im02.png").write_bytes(b"AppleDouble")
    (images / ".DS_Store").write_bytes(b"")
    after = scan(images)
    assert (after.items, after.class_names, after.skipped) == (before.items, before.class_names, before.skipped)
    (note,) = after.notes
    assert note == "17 hidden or system files and folders are ignored, such as #recycle"


@pytest.mark.parametrize("name", SYSTEM)
def test_a_folder_of_a_system_is_no_second_class(name, images):
    (images / name).mkdir()
    for other in ("class1", "class2"):
        (images / other).rename(images.parent / other)
    with pytest.raises(ImageError, match="one class, 'class0'"):
        scan(images)


def classes(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / name / "x.png")
    return folder


def test_numbers_as_names_are_ordered_as_text_and_a_note_reports_it(tmp_path):
    folder = classes(tmp_path / "images", map(str, range(12)))
    result = scan(folder)
    assert result.class_names == ("0", "1", "10", "11", *"23456789")
    (note,) = result.notes
    assert "the 12 class folders have numbers as names, and folder '10' is class 2" in note
    assert "--class-order number takes their value" in note
    ordered = scan(folder, class_order="number")
    assert ordered.class_names == tuple(map(str, range(12))) and ordered.notes == ()
    assert {item.path.split("/")[0]: item.label for item in ordered.items} == {str(i): i for i in range(12)}
    assert [item.path for item in ordered.items] == [item.path for item in result.items]


def test_no_note_where_the_order_cannot_surprise(tmp_path):
    assert scan(classes(tmp_path / "padded", ("00", "01", "02"))).notes == ()
    assert scan(classes(tmp_path / "words", ("1a", "10", "9"))).notes == ()
    (note,) = scan(classes(tmp_path / "from_one", ("1", "2", "3"))).notes
    assert "folder '1' is class 0" in note and "--class-order" not in note
    (note,) = scan(tmp_path / "from_one", class_order="number").notes
    assert "folder '1' is class 0: classes are numbered from 0, without gaps" in note


def test_only_numbers_are_ordered_by_number(tmp_path):
    with pytest.raises(ImageError, match="--class-order number: 2 class names are not whole numbers, such as '1a'"):
        scan(classes(tmp_path / "words", ("1a", "10", "²")), class_order="number")
    with pytest.raises(ImageError, match="classes '01' and '1' have the same number"):
        scan(classes(tmp_path / "twice", ("01", "1", "2")), class_order="number")


# ---- values, sizes, warnings


def test_all_values_of_16_bits_are_rounded_to_8(tmp_path, monkeypatch):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "gray.png")
    monkeypatch.setattr(reader, "_BLOCK", 1000)  # several blocks, the last one shorter
    image = open_image(tmp_path / "gray.png")
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), (values / 257).round())


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="floating-point pixels, for which black and white are not defined; save it"):
        read_image(tmp_path / "x.tif", 8)


@pytest.mark.parametrize("low, high", [(0, 1 << 24), (-5, 255)])
def test_values_beyond_16_bits_are_refused(low, high, tmp_path):
    Image.fromarray(np.linspace(low, high, 64).reshape(8, 8).astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=f"holds values from {low:,} to {high:,} instead of 0 to 65,535"):
        read_image(tmp_path / "x.tif", 8)


LARGEST_MEMORY = """
import re, sys
from pathlib import Path
from megapromoe.data.images import ImageError, read_image
try:
    print(read_image(Path(sys.argv[1]), int(sys.argv[2])).shape)
except ImageError as error:
    print(error)
# Not getrusage: its figure is at least that of the process which started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("size, side", [((20000, 1), 256), ((1, 20000), 256), ((511, 1), 256), ((40, 1), 4096)])
def test_a_strip_takes_little_memory(size, side, tmp_path):
    """20000x1 at 256 would be 5 million times 256 pixels, 5.3 GB; strips at the limit are read."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    command = [sys.executable, "-c", LARGEST_MEMORY, str(tmp_path / "strip.png"), str(side)]
    result, memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if max(size) == 511:
        assert result == "(3, 256, 256)"
    else:
        name = f"{size[0]}x{size[1]}"
        assert f"{name}: too elongated; when the short side is scaled to {side} pixels" in result
    assert int(memory) < 800  # MiB


def test_an_image_of_too_many_pixels_is_refused_by_its_size(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match=rf"more than {MAX_PIXELS:,} pixels \(.*200000000 .*; scale it down"):
        read_image(tmp_path / "large.png", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # another library may switch Pillow's own limit off
    with pytest.raises(ImageError, match=r"more than 178,956,970 pixels \(20000x10000\)"):
        read_image(tmp_path / "large.png", 8)


def test_threads_leave_the_warnings_of_the_process_as_they_are(tmp_path, monkeypatch):
    """Two threads whose reading overlaps: the first ends first."""
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    inside, left, opened = [threading.Event(), threading.Event()], threading.Event(), Image.open

    def meeting(path):
        number = int(threading.current_thread().name)
        inside[number].set()
        assert inside[1].wait(10) and (number == 0 or left.wait(10))
        return opened(path)

    monkeypatch.setattr(Image, "open", meeting)
    before = list(warnings.filters)
    first, second = (
        threading.Thread(target=read_image, args=(tmp_path / "x.png", 4), name=str(number)) for number in (0, 1)
    )
    first.start()
    assert inside[0].wait(10)
    second.start()
    first.join()
    left.set()
    second.join()
    assert warnings.filters == before


WARNS = """
import sys, warnings
from pathlib import Path
from megapromoe.data.images import read_image
print(read_image(Path(sys.argv[1]), 8).shape)
warnings.warn("of another module", UserWarning)
"""


def test_warnings_of_damaged_exif_data_are_not_shown_and_others_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif.tobytes()[:-6])
    command = [sys.executable, "-c", WARNS, str(tmp_path / "x.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 8, 8)\n" and "of another module" in done.stderr and "EXIF" not in done.stderr
    with pytest.warns(UserWarning), warnings.catch_warnings():  # the picture does make Pillow warn
        warnings.simplefilter("default")
        Image.open(tmp_path / "x.jpg").load()
