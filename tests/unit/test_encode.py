"""Encoding: the same bytes at any number of ranks, resumed where a job was killed; the tool and the command."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.latent_folders import Arrays, published, write

from megapromoe.cli import main
from megapromoe.commands.data import preset_of_shape
from megapromoe.data import encode
from megapromoe.data.autoencoder import open_autoencoder
from megapromoe.data.contact_sheet import GAP, MARGIN, contact_sheet
from megapromoe.data.encode import EncodedImages, EncodeError
from megapromoe.data.images import ImageError, read_image, scan
from megapromoe.data.latents import Latents, check, read_manifest
from megapromoe.distributed import watchdog

pytestmark = pytest.mark.usefixtures("impatient")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["kl", "tiny", "none"])
def test_the_output_is_the_same_at_any_number_of_ranks(name, images, autoencoders, tmp_path):
    def source():
        where = name if name == "none" else str(autoencoders / name)
        return EncodedImages(images, scan(images), open_autoencoder(where), 16, batch=3, workers=2, dtype="float32")

    single = files(write(tmp_path / "one", source(), 1, 5))
    assert single == files(write(tmp_path / "three", source(), 3, 5)) == files(write(tmp_path / "nine", source(), 9, 5))
    assert sorted(single) == [
        "index.safetensors",
        "manifest.json",
        "plan.json",
        *(f"shard-0000{i}.npy" for i in range(4)),
    ]
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
            drawn = data.sample(np.array([index]), np.array([view == 1]), None)
            assert np.allclose(drawn, autoencoder.normalise(mean), atol=1e-5)


def test_half_precision_is_measured_against_the_posterior(tmp_path):
    folder = write(tmp_path / "half", Arrays(dtype="float16"))
    exact = np.stack([Arrays().record(item) for item in Arrays().scan.items])
    stored = exact[:, :, 0].astype(np.float16).astype(np.float32)
    expected = math.sqrt(np.square(stored - exact[:, :, 0]).mean() / np.exp(exact[:, :, 1]).mean())
    assert read_manifest(folder).rounding == pytest.approx(expected, rel=1e-4)
    assert read_manifest(write(tmp_path / "pixels", Arrays(stochastic=False))).rounding is None


def test_a_killed_job_continues_with_the_first_unfinished_shard(tmp_path):
    complete = files(write(tmp_path / "whole"))

    class Dying(Arrays):
        def records(self, items):
            for item, record, reason in super().records(items):
                if item == self.scan.items[20]:
                    raise KeyboardInterrupt
                yield item, record, reason

    with pytest.raises(KeyboardInterrupt):
        encode.encode(Dying(), tmp_path / "killed", shard_size=16)
    names = sorted(files(tmp_path / "killed"))
    assert names == ["part-00000.json", "plan.json", "shard-00000.npy"]
    (tmp_path / "killed" / "shard-00001.npy.writing").write_bytes(b"left by a process that was killed")
    again, reported = Arrays(), []
    encode.encode(again, tmp_path / "killed", shard_size=16, progress=reported.append)
    assert [item.path for item in again.requested] == [item.path for item in again.scan.items[16:]]
    assert files(tmp_path / "killed") == complete and sum(reported) == 40
    (tmp_path / "killed" / "part-00001.json").write_text("")  # a stray file changes nothing
    done = Arrays()
    assert encode.encode(done, tmp_path / "killed", shard_size=16).records == 40 and not done.requested


def interrupted(folder):
    """Leaves the first of three shards finished."""

    class Interrupted(Arrays):
        def records(self, items):
            if items[0] != self.scan.items[0]:
                raise KeyboardInterrupt
            yield from super().records(items)

    with pytest.raises(KeyboardInterrupt):
        encode.encode(Interrupted(), folder, shard_size=16)
    return folder


def test_each_shard_and_record_is_reported_to_the_watchdog(tmp_path):
    class Recorder:
        places, touches = [], 0

        def at(self, place, extra=0.0):
            self.places.append(place)

        def touch(self):
            self.touches += 1

        def close(self):
            pass

    recorder, folder = Recorder(), tmp_path / "l"
    with watchdog.watched_by(recorder):
        encode.encode(Arrays(), folder, shard_size=16)
    shards = [f"shard {number} of 3 of {folder}" for number in (1, 2, 3)]
    ends = [f"waiting for the other ranks' shards of {folder}", f"writing the index of {folder}"]
    assert recorder.places == shards + ends and recorder.touches == 40


def test_a_damaged_part_is_named_and_its_shard_written_again(tmp_path, caplog):
    complete = files(write(tmp_path / "whole"))
    for number, change in enumerate((
        lambda text: text.replace('"labels": [0, 1', '"labels": [1, 1'),
        lambda text: text.replace('"names"', '"namez"'),
        lambda text: text[:100],
        lambda text: "[]",
    )):  # fmt: skip
        folder = interrupted(tmp_path / str(number))
        part = folder / "part-00000.json"
        text = part.read_text()
        assert change(text) != text
        part.write_text(change(text))
        caplog.clear()
        source = Arrays()
        encode.encode(source, folder, shard_size=16)
        assert len(source.requested) == 40 and f"{part} is damaged; its shard is written again" in caplog.text
        assert files(folder) == complete


def test_a_part_of_the_version_without_hashes_is_used(tmp_path):
    part = interrupted(tmp_path / "l") / "part-00000.json"
    content = json.loads(part.read_text())
    del content["part_sha256"]
    part.write_text(json.dumps(content))
    source = Arrays()
    encode.encode(source, tmp_path / "l", shard_size=16)
    assert len(source.requested) == 24 and files(tmp_path / "l") == files(write(tmp_path / "whole"))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00"], ids=range(4))
def test_a_damaged_plan_is_named(text, tmp_path):
    plan = interrupted(tmp_path / "l") / "plan.json"
    plan.write_text(text)
    with pytest.raises(EncodeError, match="plan.json is damaged: .*encode into a new folder"):
        write(tmp_path / "l")


def test_rank_0_reports_the_progress_of_every_file_once(tmp_path):
    reported = []
    rank1 = threading.Thread(target=encode.encode, args=(Arrays(), tmp_path / "l", 1, 2, 7))
    rank1.start()
    encode.encode(Arrays(), tmp_path / "l", 0, 2, 7, progress=reported.append)
    rank1.join()
    assert sum(reported) == 40 and min(reported) >= 0


def test_another_command_in_the_same_folder_is_refused(tmp_path):
    folder = write(tmp_path / "latents")
    with pytest.raises(EncodeError, match='started with other settings or images: dtype was "float32", is "float16"'):
        write(folder, Arrays(dtype="float16"))
    with pytest.raises(EncodeError, match="files was 40, is 39, files_sha256 was"):
        write(folder, Arrays(count=39))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(EncodeError, match="holds other files; give an empty or a new folder"):
        write(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_two_jobs_do_not_write_into_one_folder(tmp_path):
    class Meeting(Arrays):
        def records(self, items):
            with pytest.raises(EncodeError, match="another job is writing to it"):
                encode.encode(Arrays(), tmp_path / "l", shard_size=16)
            yield from super().records(items)

    write(tmp_path / "l", Meeting())


def test_a_missing_rank_is_reported(tmp_path):
    with pytest.raises(
        EncodeError, match="no shard was finished within 0.05 s, 1 shards are missing, the first shard-00001.npy"
    ):
        encode.encode(Arrays(), tmp_path / "l", 0, 2, 20, wait_timeout=0.05)
    with pytest.raises(EncodeError, match="rank 0 has not written it within 0.05 s"):
        encode.encode(Arrays(), tmp_path / "none", 1, 2, 20, wait_timeout=0.05)


@pytest.mark.parametrize(
    "value, message",
    [(np.nan, "float16; check the autoencoder"), (1e6, r"float16; store as float32 \(--dtype float32\)")],
)
def test_a_latent_that_is_not_finite_ends_the_job(value, message, tmp_path):
    class Wrong(Arrays):
        def record(self, item):
            record = super().record(item)
            record[1, 0, 1, 2, 3] = value if item.path == "class1/0005.png" else 0
            return record

    with pytest.raises(EncodeError, match=f"class1/0005.png: its latent is not finite as {message}"):
        write(tmp_path / "l", Wrong(dtype="float16"))
    assert not (tmp_path / "l").exists(), "nothing holds the folder: the remedy works in it"
    if np.isfinite(value):
        write(tmp_path / "l", Wrong(dtype="float32"))
        assert (tmp_path / "l" / "manifest.json").exists()


def test_after_a_failed_job_of_several_ranks_the_error_suggests_to_remove_the_folder(tmp_path):
    """One rank failed; the other may still be writing."""

    class Failing(Arrays):
        def records(self, items):
            raise EncodeError("why")

    with pytest.raises(EncodeError, match="why"):
        encode.encode(Failing(), tmp_path / "l", 0, 2, 20)
    with pytest.raises(
        EncodeError, match="other settings or images: dtype was .* or remove this one, in which no shard is"
    ):
        encode.encode(Arrays(dtype="float16"), tmp_path / "l", 0, 2, 20)


def test_no_readable_file_is_an_error(tmp_path):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "x.png").write_text("nothing")
    source = EncodedImages(tmp_path / "images", scan(tmp_path / "images"), open_autoencoder("none"), 8)
    with pytest.raises(ImageError, match="none of 2 files could be read; b/x.png: Unidentified"):
        write(tmp_path / "l", source)
    assert not (tmp_path / "l").exists()
    for label in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / "x.png")
    source = EncodedImages(tmp_path / "images", scan(tmp_path / "images"), open_autoencoder("none"), 8)
    assert len(read_manifest(write(tmp_path / "l", source)).shards) == 1


# The tool and the command


def tool(*arguments):
    return main(["encode", *map(str, arguments)])


def command(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out + output.err


def test_encode_check_and_show_from_the_command_line(images, autoencoders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("--images", images, "--autoencoder", autoencoders / "kl", "--out", "l", "--resolution", 16)
    assert tool(*call, "--dry-run") == 0 and not Path("l").exists()
    assert "16 files of 3 classes (1 others are left out, such as class2/notes.txt) -> 2x8x8" in capsys.readouterr().err
    assert tool(*call) == 0
    assert "l: 14 records, 3 files left out" in capsys.readouterr().out
    code, out = command(capsys, "check", "l")
    assert code == 0 and "14 records of 3 classes in 1 shards" in out and "no problems" in out
    assert "deviation" in out and "class1/cut.png" in out
    code, _ = command(capsys, "show", "l", "--out", "sub/sheet.png", "--count", 2)
    assert code == 0 and Image.open("sub/sheet.png").size == (MARGIN + 4 * 34, 3 * 34 + 2)
    assert command(capsys, "show", "l", "--autoencoder", "none")[0] == 0
    code, out = command(capsys, "show", "l", "--autoencoder", autoencoders / "tiny")
    assert code == 1 and "the latents were made by" in out and ": give '" in out
    assert command(capsys, "show", "l", "--class", 3) == (1, "megapromoe: --class 3: l has classes 0..2\n")
    code, out = command(capsys, "show", "l", "--out", "sheet.strange")
    assert code == 1 and "--out sheet.strange: " in out and "give the name of a .png" in out
    with open("l/shard-00000.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff\xff\xff")
    code, out = command(capsys, "check", "l")
    assert code == 1 and "record 0 (class0/deep/er/im03.Gif): wrong checksum" in out and "1 problems" in out
    code, out = command(capsys, "check", "nothing")
    assert code == 1 and "holds no manifest.json" in out


def test_notes_on_classes_and_hidden_folders_are_printed_before_anything_is_written(tmp_path, capsys):
    for name in map(str, range(11)):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "x.png")
        np.savez(tmp_path / "images" / name / "x.npz", latent=np.zeros((8, 4, 4), np.float32))
    (tmp_path / "images" / ".snapshot").mkdir()
    out = tmp_path / "l"
    for call in (("--images", tmp_path / "images", "--autoencoder", "none"), ("--npz", tmp_path / "images")):
        assert tool(*call, "--out", out, "--dry-run") == 0 and not out.exists()
        reported = capsys.readouterr().err
        assert "note: 1 hidden or system files and folders are ignored, such as .snapshot" in reported
        assert "note: the 11 class folders have numbers as names, and folder '10' is class 2" in reported
        assert tool(*call, "--out", out, "--dry-run", "--class-order", "number") == 0
        assert "numbers as names" not in capsys.readouterr().err
    call = ("--images", tmp_path / "images", "--autoencoder", "none", "--resolution", 8, "--out", out)
    assert tool(*call, "--class-order", "number") == 0
    data = Latents(out)
    assert [data.name(i).split("/")[0] for i in range(11)] == ["0", "1", "10", *"23456789"]
    assert data.labels.tolist() == [0, 1, 10, *range(2, 10)] and data.class_names == tuple(map(str, range(11)))
    assert tool(*call) == 1
    assert "started with other settings or images: class_names was" in capsys.readouterr().err
    assert tool(*call, "--class-order", "number", "--one-class") == 2
    assert "there are no classes to order" in capsys.readouterr().err


def test_speed_compares_with_a_preset_of_the_same_shape(tmp_path, capsys):
    assert [preset_of_shape(shape) for shape in ((4, 32, 32), (1, 8, 8), (4, 8, 8))] == ["promoe_xl", "digits", None]
    folder = write(tmp_path / "l", Arrays(count=16, shape=(1, 8, 8)))
    code, out = command(capsys, "speed", folder, "--seconds", 1, "--batch", 8)
    assert code == 0 and "\ndigits at 1x8x8 on one H100 takes at most" in out and "promoe_xl" not in out


def test_speed_prints_images_per_second(tmp_path, capsys):
    folder = write(tmp_path / "l")
    code, out = command(
        capsys, "speed", folder, "--seconds", 1, "--workers", 2, "--batch", 8, "--cache", tmp_path / "c"
    )
    assert code == 0 and "images/s in 2 threads, 2x4x4" in out
    assert "takes at most" not in out and "H100" not in out, "no preset takes this shape"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_mistakes_are_reported_as_a_message(images, autoencoders, tmp_path, capsys):
    assert tool("--images", tmp_path / "none", "--autoencoder", "none", "--out", tmp_path / "l") == 1
    assert "megapromoe: " in (err := capsys.readouterr().err) and "no such folder" in err
    assert tool("--images", images, "--out", tmp_path / "l") == 2
    assert "needs --autoencoder" in capsys.readouterr().err
    published(tmp_path / "npz")
    assert tool("--npz", tmp_path / "npz", "--autoencoder", autoencoders / "kl", "--out", tmp_path / "l") == 1
    assert "makes latents of shape (2, 16, 16), but the files have shape (4, 4, 4)" in capsys.readouterr().err
    assert tool("--npz", tmp_path / "npz", "--out", tmp_path / "l") == 0
    assert json.loads((tmp_path / "l" / "manifest.json").read_text())["autoencoder"]["sha256"] == ""


def test_the_sheet_shows_each_image_next_to_its_mirror_image(images, tmp_path):
    source = EncodedImages(images, scan(images), open_autoencoder("none"), 16)
    data = Latents(write(tmp_path / "l", source))
    sheet = np.asarray(contact_sheet(data, [2, 0], 3, open_autoencoder("none")))
    image = read_image(images / data.name(int(np.flatnonzero(data.labels == 2)[0])), 16).transpose(1, 2, 0)
    shown = sheet[2:34:2, MARGIN : MARGIN + 32 : 2]
    assert np.array_equal(shown, image)
    assert np.array_equal(sheet[2:34, MARGIN + 34 : MARGIN + 66], sheet[2:34, MARGIN : MARGIN + 32][:, ::-1])


def test_the_sheet_shows_the_names_of_classes_as_they_are(tmp_path):
    """Names of other scripts are legible, and whatever they are, no two classes look alike or reach into the images."""
    names = ("Жуки", "naïve", "日本", "猫", "_x", "a\nb", "W" * 40)
    for number, name in enumerate(names):
        (tmp_path / "images" / f"{number}{name}").mkdir(parents=True)
        Image.new("L", (32, 32), 10 * number).save(tmp_path / "images" / f"{number}{name}" / "x.png")
    source = EncodedImages(tmp_path / "images", scan(tmp_path / "images"), open_autoencoder("none", channels=1), 32)
    data = Latents(write(tmp_path / "l", source))
    sheet = np.asarray(contact_sheet(data, range(len(names)), 1, open_autoencoder("none", channels=1)))
    rows = [sheet[GAP + i * (32 + GAP) : (i + 1) * (32 + GAP), :MARGIN] for i in range(len(names))]
    assert all((row.max(axis=(1, 2)) > 200).any() for row in rows)
    assert len({row[:, 24:].tobytes() for row in rows}) == len(names)  # without the numbers
    for number, row in enumerate(rows):
        assert (sheet[GAP + number * (32 + GAP) :][:32, MARGIN : MARGIN + 32] == 10 * number).all()
        assert (row[:, MARGIN - 4 :] == 40).all()
