"""Encoding: the crop and the autoencoders against their definitions; the same bytes at any number of ranks."""

import json
import math
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored import Arrays, write

from megapromoe.commands import data as data_command
from megapromoe.data import encode
from megapromoe.data.autoencoder import AutoencoderError, open_autoencoder
from megapromoe.data.contact_sheet import MARGIN, contact_sheet, must_match
from megapromoe.data.encode import EncodedImages, EncodeError
from megapromoe.data.images import ImageError, Item, centre_crop, read_image, scan
from megapromoe.data.importing import PublishedLatents
from megapromoe.data.latents import Latents, check, read_manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import encode_latents  # noqa: E402

KL_SETTINGS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory):
    """Folders of small random autoencoders as diffusers saves them."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    folder, few = tmp_path_factory.mktemp("autoencoders"), (8, 8)
    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=few, norm_num_groups=4, latent_channels=2, **KL_SETTINGS)
    kl.save_pretrained(folder / "kl")
    kl.save_pretrained(folder / "pipeline" / "vae")
    kl.save_pretrained(folder / "pickled", safe_serialization=False)
    per_channel = dict(latents_mean=[0.5, -1.0], latents_std=[2.0, 4.0], scaling_factor=0.5, shift_factor=None)
    kl.register_to_config(**per_channel)
    kl.save_pretrained(folder / "per_channel")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    ).save_pretrained(folder / "tiny")
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder of three classes, nested, in many modes, with two broken files and one that is none."""
    random = np.random.default_rng(0)
    folder = tmp_path / "images"
    for number in range(14):
        pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        path = folder / f"class{number % 3}" / ("deep/er" if number % 2 else "") / f"im{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 4 == 1:
            image.convert(["L", "CMYK"][number % 8 == 1]).save(path.with_suffix(".JPEG"))
        elif number % 4 == 3:
            image.convert("P").save(path.with_suffix(".Gif"), format="gif")
        else:
            image.save(path)
    whole = (folder / "class0" / "im00.png").read_bytes()
    (folder / "class1" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "class2" / "text.jpg").write_text("no image")
    (folder / "class2" / "notes.txt").write_text("no image by its name")
    return folder


# Images


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


# Autoencoders


def test_kl_gives_diffusers_posterior_and_decodes(autoencoders):
    from diffusers import AutoencoderKL

    # As ours: whether parameters want gradients decides, on some CPUs, which kernels run, and so the last bit.
    model = AutoencoderKL.from_pretrained(autoencoders / "kl", low_cpu_mem_usage=False).eval().requires_grad_(False)
    opened = open_autoencoder(str(autoencoders / "kl"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        posterior = model.encode(x).latent_dist
        mean, logvar = opened.encode(x)
        assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
        assert torch.allclose(opened.normalise(mean), mean * 0.18215)
        decoded = model.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(opened.decode(opened.normalise(mean)), decoded, atol=1e-5)
    assert opened.latent_shape(16) == (2, 8, 8) == tuple(mean.shape[1:]) and opened.resolution(8) == 16
    assert open_autoencoder(str(autoencoders / "pipeline")).identity["sha256"] == opened.identity["sha256"]
    with pytest.raises(AutoencoderError, match="resolution 17 must be a multiple of 2, .*nearest: 16, 18"):
        opened.latent_shape(17)
    with pytest.raises(AutoencoderError, match="latents have 4 channels, .* makes 2"):
        opened.decode(torch.zeros(1, 4, 8, 8))


def test_tiny_has_no_variance(autoencoders):
    opened = open_autoencoder(str(autoencoders / "tiny"))
    mean, logvar = opened.encode(torch.zeros(1, 3, 16, 16))
    assert logvar is None and not opened.stochastic and tuple(mean.shape[1:]) == opened.latent_shape(16)
    assert opened.decode(mean).shape == (1, 3, 16, 16)
    assert opened.identity["sha256"] != open_autoencoder(str(autoencoders / "kl")).identity["sha256"]


def test_means_and_deviations_of_channels_are_used_as_diffusers_pipelines_do(autoencoders):
    opened = open_autoencoder(str(autoencoders / "per_channel"))
    raw = torch.randn(3, 2, 4, 4)
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in ([0.5, -1.0], [2.0, 4.0]))
    latents = opened.normalise(raw)
    assert torch.allclose(latents, (raw - mean) * 0.5 / std, atol=1e-6)
    assert torch.allclose(opened.decode(latents), opened.model.decode(raw).sample.clamp(-1, 1), atol=1e-5)


def test_autoencoders_that_cannot_be_opened_say_why(autoencoders, tmp_path):
    with pytest.raises(AutoencoderError, match="no such folder, and no owner/name"):
        open_autoencoder("nothing")
    with pytest.raises(AutoencoderError, match="cannot be opened: .*config.json"):
        open_autoencoder(str(tmp_path))
    with pytest.raises(AutoencoderError, match="cannot be opened: .*safetensors"):
        open_autoencoder(str(autoencoders / "pickled"))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(AutoencoderError, match="is a UNet2DModel; give an AutoencoderKL or an AutoencoderTiny"):
        open_autoencoder(str(tmp_path))
    with pytest.raises(AutoencoderError, match="takes 3 channels, the images have 1"):
        open_autoencoder(str(autoencoders / "kl"), channels=1)
    with pytest.raises(AutoencoderError, match="1 or 3 channels, not 4"):
        open_autoencoder("none", channels=4)


# The job


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(encode, "POLL", 0.01)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["kl", "tiny", "none"])
def test_the_output_is_the_same_at_any_number_of_ranks(name, images, autoencoders, tmp_path):
    def source():
        where = name if name == "none" else str(autoencoders / name)
        return EncodedImages(images, scan(images), open_autoencoder(where), 16, batch=3, workers=2, dtype="float32")

    one = files(write(tmp_path / "one", source(), 1, 5))
    assert one == files(write(tmp_path / "three", source(), 3, 5)) == files(write(tmp_path / "nine", source(), 9, 5))
    assert sorted(one) == ["index.safetensors", "manifest.json", "plan.json", *(f"shard-0000{i}.npy" for i in range(4))]
    assert check(tmp_path / "one") == []
    data = Latents(tmp_path / "one")
    assert len(data) == 14 and [path for path, _ in data.manifest.skipped] == [
        "class1/cut.png",
        "class2/notes.txt",
        "class2/text.jpg",
    ]
    for index in (0, 7, 13):
        x = torch.from_numpy(read_image(images / data.name(index), 16)[None] / 127.5 - 1).float()
        assert data.class_names[data.labels[index]] == data.name(index).split("/")[0]
        autoencoder = source().autoencoder
        for view, image in enumerate((x, x.flip(-1))):
            mean, logvar = autoencoder.encode(image)
            if name != "none":
                assert np.allclose(data.raw(index)[view, 0], mean[0], atol=1e-5)
            if logvar is not None:
                assert np.allclose(data.raw(index)[view, 1], logvar[0], atol=1e-5)
            drawn = data.draw(np.array([index]), np.array([view == 1]), None)
            assert np.allclose(drawn, autoencoder.normalise(mean), atol=1e-5)


def test_half_precision_is_measured_against_the_posterior(tmp_path):
    folder = write(tmp_path / "half", Arrays(dtype="float16"))
    exact = np.stack([Arrays().record(item) for item in Arrays().scan.items])
    stored = exact[:, :, 0].astype(np.float16).astype(np.float32)
    expected = math.sqrt(np.square(stored - exact[:, :, 0]).mean() / np.exp(exact[:, :, 1]).mean())
    assert read_manifest(folder).rounding == pytest.approx(expected, rel=1e-4)
    assert read_manifest(write(tmp_path / "pixels", Arrays(stochastic=False))).rounding is None


def test_a_killed_job_goes_on_with_the_first_unfinished_shard(tmp_path):
    whole = files(write(tmp_path / "whole"))

    class Dying(Arrays):
        def records(self, items):
            for item, record, reason in super().records(items):
                if item == self.scan.items[20]:
                    raise KeyboardInterrupt
                yield item, record, reason

    with pytest.raises(KeyboardInterrupt):
        encode.encode(Dying(), tmp_path / "killed", shard_size=16)
    names = sorted(files(tmp_path / "killed"))
    assert names == ["part-00000.json", "plan.json", "shard-00000.npy", "shard-00001.npy.writing"]
    again, told = Arrays(), []
    encode.encode(again, tmp_path / "killed", shard_size=16, progress=told.append)
    assert [item.path for item in again.asked] == [item.path for item in again.scan.items[16:]]
    assert files(tmp_path / "killed") == whole and sum(told) == 40
    (tmp_path / "killed" / "part-00001.json").write_text("")  # a stray file changes nothing
    done = Arrays()
    assert encode.encode(done, tmp_path / "killed", shard_size=16).records == 40 and not done.asked


def test_the_bar_of_rank_0_is_told_of_every_file_once(tmp_path):
    told = []
    rank1 = threading.Thread(target=encode.encode, args=(Arrays(), tmp_path / "l", 1, 2, 7))
    rank1.start()
    encode.encode(Arrays(), tmp_path / "l", 0, 2, 7, progress=told.append)
    rank1.join()
    assert sum(told) == 40 and min(told) >= 0


def test_another_command_in_the_same_folder_is_refused(tmp_path):
    folder = write(tmp_path / "latents")
    with pytest.raises(EncodeError, match='begun from something else: dtype was "float32", is "float16"'):
        write(folder, Arrays(dtype="float16"))
    with pytest.raises(EncodeError, match="files was 40, is 39, files_sha256 was"):
        write(folder, Arrays(count=39))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(EncodeError, match="holds other things; give an empty or a new folder"):
        write(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_two_jobs_do_not_write_into_one_folder(tmp_path):
    class Meeting(Arrays):
        def records(self, items):
            with pytest.raises(EncodeError, match="another job is writing here"):
                encode.encode(Arrays(), tmp_path / "l", shard_size=16)
            yield from super().records(items)

    write(tmp_path / "l", Meeting())


def test_a_missing_rank_is_told(tmp_path):
    with pytest.raises(EncodeError, match="nothing new in 0.05 s, 1 shards are missing, the first shard-00001.npy"):
        encode.encode(Arrays(), tmp_path / "l", 0, 2, 20, patience=0.05)
    with pytest.raises(EncodeError, match="rank 0 has not begun in 0.05 s"):
        encode.encode(Arrays(), tmp_path / "none", 1, 2, 20, patience=0.05)


@pytest.mark.parametrize(
    "value, told",
    [(np.nan, "float16; see to the autoencoder"), (1e6, r"float16; store as float32 \(--dtype float32\)")],
)
def test_a_latent_that_is_not_finite_ends_the_job(value, told, tmp_path):
    class Wrong(Arrays):
        def record(self, item):
            record = super().record(item)
            record[1, 0, 1, 2, 3] = value if item.path == "class1/0005.png" else 0
            return record

    with pytest.raises(EncodeError, match=f"class1/0005.png: its latent is not finite as {told}"):
        write(tmp_path / "l", Wrong(dtype="float16"))
    assert not (tmp_path / "l" / "manifest.json").exists()


def test_no_readable_file_is_an_error(tmp_path):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "x.png").write_text("nothing")
    source = EncodedImages(tmp_path / "images", scan(tmp_path / "images"), open_autoencoder("none"), 8)
    with pytest.raises(ImageError, match="none of 2 files could be read; b/x.png: Unidentified"):
        write(tmp_path / "l", source)


# Published latents


def published(folder, change=None, flip=True):
    """Six files of two classes as ProMoE's release makes them."""
    arrays = {}
    for number in range(6):
        path = folder / f"n{number % 2}" / f"im{number}.latent.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(number).standard_normal((2, 8, 4, 4)).astype(np.float32)
        draw[0, 7, 0, 0] = -40  # cut off at -30
        arrays[path.relative_to(folder).as_posix()] = draw
        content = {"latent": draw[0]} | ({"latent_flip": draw[1]} if flip else {})
        np.savez_compressed(path, **(change(content) if change and number == 3 else content))
    return arrays


def test_published_latents_are_imported(tmp_path):
    arrays = published(tmp_path / "npz")
    data = Latents(write(tmp_path / "l", PublishedLatents(tmp_path / "npz", dtype="float32"), 2, 4))
    assert data.shape == (4, 4, 4) and data.stochastic and data.manifest.mirror == "stored" and len(data) == 6
    normal = np.random.default_rng(9).standard_normal((1, 4, 4, 4)).astype(np.float32)
    for index in range(6):
        for view in (0, 1):
            mean, logvar = np.split(arrays[data.name(index)][view], 2)
            expected = (mean + np.exp(0.5 * logvar.clip(-30, 20)) * normal[0]) * 0.18215
            drawn = data.draw(np.array([index]), np.array([view == 1]), normal)[0]
            assert np.allclose(drawn, expected, atol=1e-5)
        assert data.name(index).startswith(f"n{data.labels[index]}/")
    assert data.raw(0)[0, 1].min() == -30


def test_published_values_without_mirror_images(tmp_path):
    arrays = published(tmp_path / "npz", flip=False)
    data = Latents(write(tmp_path / "l", PublishedLatents(tmp_path / "npz", "latent", 1.0, dtype="float32")))
    assert data.shape == (8, 4, 4) and not data.stochastic and data.manifest.mirror == "none"
    drawn = data.draw(np.array([2]), np.zeros(1, bool), None)
    assert np.array_equal(drawn[0], arrays[data.name(2)][0])


def test_published_files_that_are_wrong(tmp_path):
    published(tmp_path / "other", lambda c: {"moments": c["latent"]})
    data = Latents(write(tmp_path / "l1", PublishedLatents(tmp_path / "other")))
    assert len(data) == 5 and data.manifest.skipped[0][0] == "n1/im3.latent.npz"
    assert "holds moments, but no `latent`" in data.manifest.skipped[0][1]
    published(tmp_path / "pickle", lambda c: {"latent": np.array([{}], dtype=object)})
    assert (
        "allow_pickle" in Latents(write(tmp_path / "l2", PublishedLatents(tmp_path / "pickle"))).manifest.skipped[0][1]
    )
    published(tmp_path / "mixed", lambda c: {name: a[:, :2] for name, a in c.items()})
    with pytest.raises(ImageError, match=r"n1/im3.latent.npz: holds \(8, 2, 4\).*2 of \(8, 4, 4\); all must be alike"):
        write(tmp_path / "l3", PublishedLatents(tmp_path / "mixed"))
    published(tmp_path / "odd", lambda c: c)
    for path in (tmp_path / "odd").rglob("*.npz"):
        np.savez(path, latent=np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ImageError, match="3 channels are no mean and log-variance"):
        PublishedLatents(tmp_path / "odd")
    for path in (tmp_path / "odd").rglob("*.npz"):
        path.write_text("")
    with pytest.raises(ImageError, match="none of 6 files can be read"):
        PublishedLatents(tmp_path / "odd")


# The tool and the command


def tool(*arguments):
    return encode_latents.main([str(a) for a in arguments])


def command(capsys, *arguments):
    import argparse

    parser = argparse.ArgumentParser()
    data_command.arguments(parser)
    code = data_command.run(parser.parse_args([str(a) for a in arguments]), None)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_encode_check_and_show_from_the_command_line(images, autoencoders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("--images", images, "--autoencoder", autoencoders / "kl", "--out", "l", "--resolution", 16)
    assert tool(*call, "--dry-run") == 0 and not Path("l").exists()
    assert "16 files of 3 classes (1 others are left out, such as class2/notes.txt) -> 2x8x8" in capsys.readouterr().err
    assert tool(*call) == 0
    assert "l: 14 records, 3 files left out" in capsys.readouterr().out
    code, out = command(capsys, "check", "l")
    assert code == 0 and "14 records of 3 classes in 1 shards" in out and "nothing is wrong" in out
    assert "deviation" in out and "class1/cut.png" in out
    code, _ = command(capsys, "show", "l", "--out", "sub/sheet.png", "--count", 2)
    assert code == 0 and Image.open("sub/sheet.png").size == (MARGIN + 4 * 34, 3 * 34 + 2)
    assert command(capsys, "show", "l", "--autoencoder", "none")[0] == 0
    code, out = command(capsys, "show", "l", "--autoencoder", autoencoders / "tiny")
    assert code == 1 and "the latents were made by" in out and "give that one" in out
    assert command(capsys, "show", "l", "--class", 3) == (1, "megapromoe: --class 3: l has classes 0..2\n")
    code, out = command(capsys, "show", "l", "--out", "sheet.strange")
    assert code == 1 and "--out sheet.strange: " in out and "give the name of a .png" in out
    with open("l/shard-00000.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff\xff\xff")
    code, out = command(capsys, "check", "l")
    assert code == 1 and "record 0 (class0/deep/er/im03.Gif): its checksum is another" in out and "1 problems" in out
    code, out = command(capsys, "check", "nothing")
    assert code == 1 and "holds no manifest.json" in out


def test_speed_says_how_many_images(tmp_path, capsys):
    folder = write(tmp_path / "l")
    code, out = command(
        capsys, "speed", folder, "--seconds", 1, "--workers", 2, "--batch", 8, "--cache", tmp_path / "c"
    )
    assert code == 0 and "images/s in 2 threads, 2x4x4" in out and "promoe_xl" in out
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_tool_tells_mistakes_in_a_sentence(images, autoencoders, tmp_path, capsys):
    assert tool("--images", tmp_path / "none", "--autoencoder", "none", "--out", tmp_path / "l") == 1
    assert "encode_latents: " in (err := capsys.readouterr().err) and "no such folder" in err
    with pytest.raises(SystemExit) as error:
        tool("--images", images, "--out", tmp_path / "l")
    assert error.value.code == 2 and "needs --autoencoder" in capsys.readouterr().err
    published(tmp_path / "npz")
    assert tool("--npz", tmp_path / "npz", "--autoencoder", autoencoders / "kl", "--out", tmp_path / "l") == 1
    assert "makes latents of shape (2, 16, 16), the files hold (4, 4, 4)" in capsys.readouterr().err
    assert tool("--npz", tmp_path / "npz", "--out", tmp_path / "l") == 0
    assert json.loads((tmp_path / "l" / "manifest.json").read_text())["autoencoder"]["sha256"] == ""


def test_the_sheet_shows_each_image_beside_its_mirror_image(images, tmp_path):
    source = EncodedImages(images, scan(images), open_autoencoder("none"), 16)
    data = Latents(write(tmp_path / "l", source))
    sheet = np.asarray(contact_sheet(data, [2, 0], 3, open_autoencoder("none")))
    image = read_image(images / data.name(int(np.flatnonzero(data.labels == 2)[0])), 16).transpose(1, 2, 0)
    shown = sheet[2:34:2, MARGIN : MARGIN + 32 : 2]
    assert np.array_equal(shown, image)
    assert np.array_equal(sheet[2:34, MARGIN + 34 : MARGIN + 66], sheet[2:34, MARGIN : MARGIN + 32][:, ::-1])


def test_an_unnamed_autoencoder_matches_any():
    pixels = open_autoencoder("none")
    must_match({"name": "", "kind": "", "sha256": ""}, pixels)
    must_match(pixels.identity, pixels)
    with pytest.raises(AutoencoderError):
        must_match({"name": "vae", "kind": "AutoencoderKL", "sha256": "00"}, pixels)
