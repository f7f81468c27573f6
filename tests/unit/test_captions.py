"""Captions beside images: what is read in each form, and one message for all that cannot be used."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.text_folders import png, write_captioned

from megapromoe.data.captions import CaptionedItem, CaptionError, read_captions
from megapromoe.data.images import ImageError, read_image
from megapromoe.data.tars import TarError

webdataset = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("webdataset") is None, reason="webdataset is not installed"
)
FORMS = ["jsonl", "txt", pytest.param("tar", marks=webdataset)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_images_with_their_captions(form, tmp_path):
    source = write_captioned(tmp_path / "photos", form)
    captioned = read_captions(source)
    assert [item.caption for item in captioned.items] == [
        f"picture number {i}, in many colours \u00e9" for i in range(5)
    ]
    prefix = ["part-0.tar/dir/", "part-0.tar/dir/", "part-0.tar/dir/", "part-1.tar/dir/", "part-1.tar/dir/"]
    ending = "png" if form == "tar" else "PNG"
    expected = [f"{prefix[i] if form == 'tar' else ''}im{i}.{ending}" for i in range(5)]
    assert [item.path for item in captioned.items] == expected and captioned.scan.items == captioned.items
    assert captioned.scan.class_names == ("captioned",) and captioned.scan.skipped == ()
    for number, item in enumerate(captioned.items):
        if number == 2:
            with pytest.raises(ImageError, match="cannot identify image file"):
                read_image(captioned.open(item), 20)
        else:
            pixels = np.asarray(Image.open(BytesIO(png(number)))).transpose(2, 0, 1)
            assert np.array_equal(read_image(captioned.open(item), 20), pixels)


def lines(path: Path, *content: bytes) -> Path:
    path.write_bytes(b"\n".join(content))
    return path


def test_all_problems_of_a_jsonl_are_in_one_message_and_can_be_left_out(tmp_path):
    source = lines(
        tmp_path / "all.jsonl",
        b'{"image": "a.png", "caption": "good"}',
        b"",
        b'{"image": "b.png"}',
        b'{"image": "c.png", "caption": " \\n"}',
        b'{"image": "d.png", "caption": ""}',
        b'{"image": "e.png", "caption": "\xff"}',
        b'{"image": "f.png", "caption": "\\ud800"}',
        b"{",
        b"[]",
        b'{"caption": "no image"}',
        b'{"image": "g.png", "caption": 3}',
        b"[" * 100_000,
    )
    with pytest.raises(CaptionError) as refused:
        read_captions(source)
    reasons = (
        *("1 missing, such as line 3", "2 empty, such as line 4", "1 not UTF-8, such as line 6"),
        *("1 not valid Unicode, such as line 7", "2 not JSON, such as line 8", "1 not a JSON object, such as line 9"),
        *('1 without a text "image", such as line 10', "1 not text, such as line 11"),
    )
    remedy = "correct them, or leave them out with --skip-bad-captions"
    assert str(refused.value) == f"{source}: 10 captions cannot be used: {', '.join(reasons)}; {remedy}"
    captioned = read_captions(source, skip=True)
    assert captioned.items == (CaptionedItem("a.png", 0, "good"),)
    assert len(captioned.scan.skipped) == 10 and ("line 4", "caption empty") in captioned.scan.skipped
    assert [item.path for item in read_captions(source, skip=True, text_only=True).items] == ["a.png", "line 10"]


def test_problems_of_files_beside_images(tmp_path):
    folder = write_captioned(tmp_path / "photos", "txt")
    (folder / "im0.txt").unlink()
    (folder / "im1.txt").write_bytes(b"\xe9t\xe9")
    (folder / "im3.txt").write_text(" \n")
    (folder / "notes.txt").write_text("of no image")
    with pytest.raises(
        CaptionError, match=r"3 captions .*: 1 missing, such as im0.txt, 1 not UTF-8, such as im1.txt, 1 empty"
    ):
        read_captions(folder)
    captioned = read_captions(folder, skip=True)
    assert [item.path for item in captioned.items] == ["im2.PNG", "im4.PNG"]
    assert ("notes.txt", "not the name of an image") in captioned.scan.skipped and len(captioned.scan.skipped) == 4
    listed = write_captioned(tmp_path / "listed", "jsonl")
    with pytest.raises(CaptionError, match=f"{listed.parent} holds no .txt files; give {listed}, if it holds the"):
        read_captions(listed.parent)
    with_mark = write_captioned(tmp_path / "windows", "txt")
    (with_mark / "im0.txt").write_bytes("\ufeffa caption".encode())
    assert read_captions(with_mark).items[0].caption == "a caption"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl cannot be read: No such file or directory; give a .jsonl file"),
        ("empty.jsonl", b"\n", "empty.jsonl holds no caption that can be used; give another source"),
        ("captions.csv", b"a,b", "captions.csv: captions are a .jsonl file, .tar files, or a folder of images"),
        ("none", None, "none: no such file or folder; give a .jsonl, a folder of images, or .tar files"),
    ],
)
def test_sources_without_captions_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError) as refused:
        read_captions(tmp_path / name)
    assert message in str(refused.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("text")
    with pytest.raises(CaptionError, match="none of its 1 files is an image or a .tar"):
        read_captions(tmp_path / "folder")


# ---- tars


def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    file.addfile(entry, BytesIO(content))


@webdataset
def test_samples_are_those_of_the_library(tmp_path):
    import webdataset as library

    with library.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"some/{number:03d}", "png": png(number), "txt": f"caption {number}"})
        writer.write({"__key__": "v1.5/more", "JPG": png(9), "seg.png": png(8), "txt": "with dots"})
    captioned = read_captions(tmp_path / "a.tar")
    theirs = list(library.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [item.caption for item in captioned.items] == [sample["txt"].decode() for sample in theirs]
    for item, sample in zip(captioned.items, theirs, strict=True):
        content = captioned.open(item)
        assert content.getvalue() == sample.get("png", sample.get("jpg"))


@webdataset
def test_patterns_name_several_tars(tmp_path):
    folder = write_captioned(tmp_path / "tars", "tar")
    captioned = read_captions(folder / "part-{0..1}.tar")
    assert captioned.items == read_captions(folder).items
    with pytest.raises(TarError, match=r"part-2.tar: no such file \(2 of 4 are missing\); give existing tars"):
        read_captions(folder / "part-{0..3}.tar")


@webdataset
def test_problems_of_tars_are_in_one_message(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, content in {
            "1.png": png(1), "1.txt": b"good", "2.png": png(2), "3.png": png(3), "3.txt": b"\xff", "4.txt": b"no image",
            "5.png": png(5), "5.json": b'{"caption": ""}', "6.png": png(6), "6.json": b"{", "__meta__/7.txt": b"",
        }.items():  # fmt: skip
            add(file, name, content)
    with pytest.raises(CaptionError) as refused:
        read_captions(tmp_path / "a.tar")
    for part in ("5 captions", "1 missing, such as a.tar/2.png", "1 not UTF-8", "1 without an image, such as a.tar/4",
                 "1 empty, such as a.tar/5.png", "1 not JSON, such as a.tar/6.png"):  # fmt: skip
        assert part in str(refused.value)
    assert [item.path for item in read_captions(tmp_path / "a.tar", skip=True).items] == ["a.tar/1.png"]
    text = read_captions(tmp_path / "a.tar", skip=True, text_only=True)
    assert [item.caption for item in text.items] == ["good", "no image"]


@webdataset
def test_damaged_tars_are_named(tmp_path):
    folder = write_captioned(tmp_path / "tars", "tar")
    content = (folder / "part-0.tar").read_bytes()
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        for _ in range(2):
            add(file, "1.png", png(1))
            add(file, "2.txt", b"other")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as file:
        add(file, "1.txt", b"text")
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 3])
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    for name in ("twice", "zipped", "cut", "text"):
        with pytest.raises(ImageError, match=f"{name}.tar") as refused:
            read_captions(tmp_path / f"{name}.tar")
        assert "write" in str(refused.value), refused.value
    captioned = read_captions(folder)
    (folder / "part-1.tar").write_bytes(b"")
    with pytest.raises(TarError, match="part-1.tar is cut off within part-1.tar/dir/im3.png; write it again"):
        captioned.open(captioned.items[3])


def test_a_surrogate_in_json_is_no_caption(tmp_path):
    """Half of a pair cannot be written as UTF-8, which would end the job much later."""
    source = lines(tmp_path / "a.jsonl", json.dumps({"image": "a.png", "caption": "\ud83d"}).encode())
    with pytest.raises(CaptionError, match="1 not valid Unicode, such as line 1"):
        read_captions(source)
