"""Tables that are refused: one sentence with file, record and remedy, and nothing half-written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.table_files import (
    FIXTURE,
    FORMATS,
    labels,
    latents,
    npy,
    write_hdf5,
    write_images,
    write_latents,
    write_parquet,
    write_tar,
)
from support.text_folders import png

from megapromoe.cli import main

pytestmark = pytest.mark.usefixtures("impatient")
NAN = np.nan


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs `encode`, which must refuse with one sentence and leave no data; returns the sentence."""
    monkeypatch.chdir(tmp_path)

    def run(path: Path | str, *words, kind="--latents") -> str:
        capsys.readouterr()
        how = ("--scale", "1") if kind == "--latents" else ("--autoencoder", "none", "--resolution", "8")
        out = tmp_path / "out"
        code = main(["encode", kind, str(path), "--out", str(out), *how, *map(str, words)])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megapromoe")]
        assert code in (1, 2) and line.startswith("megapromoe: ")
        assert not out.exists(), f"{sorted(path.name for path in out.iterdir())} were left"
        return line.removeprefix("megapromoe: ").replace(f"{tmp_path}/", "")

    return run


NEEDS = dict.fromkeys(("parquet", "npy_column", "tensor_column"), "pyarrow")
NEEDS |= {"hdf5": "h5py", "edm2_hdf5": "h5py", "tar": "webdataset"}
RECORD = {
    "parquet": "train-1.parquet#1", "npy_column": "train-1.parquet#1", "tensor_column": "train-1.parquet#1",
    "tensors": "latents_rank00_shard001.safetensors#1", "hdf5": "1.h5#1", "edm2_hdf5": "00000/img-00000006.npy",
    "edm2": "00000/img-00000006.npy", "fast_dit": "imagenet256_features/6.npy", "tar": "part-1.tar/001.npy",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_not_finite_are_named_in_every_format(form, tmp_path, refused):
    pytest.importorskip(NEEDS.get(form, "numpy"))
    values = latents()
    values[6, 1, 0, 1] = NAN
    path = write_latents(tmp_path / "data", form, values, labels())
    given = path.relative_to(tmp_path)
    problem = "holds values that are not finite; remove the record or encode it again"
    assert refused(given) == f"{given}, {RECORD[form]}: {problem}"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("label, words", [(7, ["--num-classes", 3]), (-1, []), (1 << 40, [])])
def test_labels_out_of_range_are_named_in_every_format(form, label, words, tmp_path, refused):
    pytest.importorskip(NEEDS.get(form, "numpy"))
    of = labels()
    of[6] = label
    path = write_latents(tmp_path / "data", form, latents(), of).relative_to(tmp_path)
    message = refused(path, *words)
    assert message.startswith(f"{path}, {RECORD[form]}: has label {label}")
    assert ("which makes more classes than the 10 records" if label > 7 else "which is not in 0..2") in message


@pytest.mark.parametrize("form", ["edm2_hdf5", "edm2", "fast_dit", "tar", "parquet"])
def test_missing_labels_are_named(form, tmp_path, refused):
    pytest.importorskip(NEEDS.get(form, "numpy"))
    path = write_latents(tmp_path / "data", form, latents(), labels())
    if form == "edm2":
        file = path / "dataset.json"
        listed = json.loads(file.read_text())["labels"]
        file.write_text(json.dumps({"labels": listed[:6] + listed[7:]}))
    elif form == "edm2_hdf5":
        import h5py

        with h5py.File(path, "a") as content:
            listed = json.loads(content["dataset.json"][()].tobytes())["labels"]
            del content["dataset.json"]
            text = json.dumps({"labels": listed[:6] + listed[7:]}).encode()
            content["dataset.json"] = np.frombuffer(text, np.uint8)
    elif form == "fast_dit":
        (path / "imagenet256_labels" / "6.npy").unlink()
    elif form == "tar":
        members = {f"{i:03d}.npy": npy(latents()[i]) for i in range(5)}
        write_tar(path / "part-1.tar", dict(sorted((members | {f"{i:03d}.cls": b"0" for i in (0, 2, 3, 4)}).items())))
    else:
        write_parquet(path / "train-1.parquet", {"latent": latents(5).tolist(), "label": [0, None, 0, 0, 0]})
        (path / "train-0.parquet").unlink()
    message = refused(path.relative_to(tmp_path))
    assert f", {RECORD[form]}: has no label (1 of " in message and message.endswith(
        "--one-class if all are of one class"
    )


@pytest.mark.parametrize("form", FORMATS)
def test_files_that_are_cut_off_or_damaged_are_named(form, tmp_path, refused):
    pytest.importorskip(NEEDS.get(form, "numpy"))
    path = write_latents(tmp_path / "data", form, latents(40, (4, 4, 4)), labels(40))
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    file = next(file for file in reversed(files) if "labels" not in str(file) and file.suffix != ".json")
    content = file.read_bytes()
    end = len(content) - (10240 if form == "tar" else 1)  # a tar ends with empty blocks
    for size in (0, 1, len(content) // 2, end):
        file.write_bytes(content[:size])
        message = refused(path.relative_to(tmp_path))
        assert file.name in message, message
        assert any(remedy in message for remedy in ("write it again", "copy it", "create it again")), message


def test_a_damaged_page_of_parquet_is_noticed(tmp_path, refused):
    pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "a.parquet", {"latent": latents().tolist(), "label": labels()}, 10)
    import pyarrow.parquet as pq

    chunk = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.dictionary_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    assert "a.parquet cannot be read: " in (message := refused("a.parquet")) and "damaged" in message, message


@pytest.mark.parametrize("form", ["parquet", "tensors", "hdf5", "tar"])
def test_another_shape_within_the_data_is_refused(form, tmp_path, refused):
    pytest.importorskip(NEEDS.get(form, "numpy"))
    first, second = (write_latents(tmp_path / f"d{c}", form, latents(8, (c, 2, 2)), labels(8)) for c in (4, 3))
    for old, new in zip(sorted(first.iterdir())[1:], sorted(second.iterdir())[1:], strict=True):
        new.replace(old)
    expected = "#0: has shape (3, 2, 2), the first record (4, 2, 2); all must have the same shape"
    assert expected.replace("#0", "000.npy" if form == "tar" else "#0") in refused("d4")
    assert "3 channels cannot be halves" in refused("d3" if form != "tar" else "d3/part-0.tar", "--values", "posterior")


def test_negative_deviations_are_refused(tmp_path, refused):
    path = write_latents(tmp_path / "data", "edm2", latents(), labels())
    assert "img-00000000.npy: the second half of its channels has negative values" in refused(
        path, "--values", "mean_std"
    )


def test_columns_that_are_missing_or_ambiguous(tmp_path, refused):
    pytest.importorskip("pyarrow")
    import pyarrow as pa

    columns = {"latent": latents().tolist(), "label": labels()}
    write_parquet(tmp_path / "a.parquet", {"vectors": columns["latent"], "label": labels()})
    message = refused("a.parquet")
    assert message.startswith("a.parquet: none of its fields has a usual name of latents (latents, latent, ")
    assert message.endswith("it holds vectors, label: give --data-field NAME")
    assert refused("a.parquet", "--data-field", "z") == "a.parquet: has no 'z' (--data-field); it holds vectors, label"
    write_parquet(tmp_path / "b.parquet", {"latent": columns["latent"], "caption": ["x"] * 10})
    assert "give --label-field NAME, or --one-class if all records are of one class" in refused("b.parquet")
    assert "labels are whole numbers or text, column 'latent' is list" in refused(
        "b.parquet", "--label-field", "latent"
    )
    assert "each of its 10 labels is another text" in refused(
        write_parquet(tmp_path / "c.parquet", columns | {"label": [str(i) for i in range(10)]}).name
    )
    ragged = pa.array([[1.0, 2.0]] * 5 + [[1.0]] + [[1.0, 2.0]] * 4)
    message = refused(write_parquet(tmp_path / "d.parquet", columns | {"latent": ragged}).name)
    assert "d.parquet, d.parquet#0: has shape (2,), not (C, H, W)" in message
    write_parquet(tmp_path / "e.parquet", columns | {"latent": [npy(latents()[0])] * 9 + [b"none"]})
    assert "e.parquet, record 9: is not the content of a .npy file" in refused("e.parquet")
    write_parquet(tmp_path / "f.parquet", columns | {"latent": [npy(latents()[0])] * 9 + [None]})
    assert "f.parquet, f.parquet#9: holds no latent" in refused("f.parquet")
    write_parquet(tmp_path / "g.parquet", columns | {"image": [png(0)] * 10, "label": labels()})
    assert "column 'latent' is list" in refused("g.parquet", "--data-field", "latent", kind="--images")
    table = pa.table([pa.array(columns["latent"]), pa.array(labels()), pa.array(labels())], ["latent", "y", "y"])
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "h.parquet")
    assert "two of its columns are named 'y'; rename one" in refused("h.parquet")
    write_parquet(tmp_path / "i.parquet", {name: column[:0] for name, column in columns.items()})
    assert "i.parquet: holds no records" in refused("i.parquet")
    write_parquet(tmp_path / "j.parquet", columns | {"label": [3] * 10})
    assert "all 10 records have the label 3; give --one-class" in refused("j.parquet")


def test_no_other_file_is_opened(tmp_path, refused):
    """Images by their paths, other files of a folder of datasets, links and values outside of an HDF5 file."""
    pytest.importorskip("pyarrow"), pytest.importorskip("h5py")
    import h5py
    import pyarrow as pa

    (tmp_path / "secret.png").write_bytes(png(0))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name in ("/etc/passwd", "../secret.png", "secret.png"):
        column = pa.array([{"bytes": None, "path": name}] * 4, kind)
        write_parquet(tmp_path / "data" / "a.parquet", {"image": column, "label": [0, 1, 0, 1]})
        message = refused("data", kind="--images")
        assert message.startswith(f"data/a.parquet, record 0: names the file {name!r} instead of holding the image")
    for name in ("../latents.parquet", "/etc/passwd", "..", 3, "a/b.arrow"):
        folder = tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        assert f"saved/state.json: names {name!r}, which is not a file of its folder" in refused("saved")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["latents"] = latents()
    np.arange(160, dtype="<f4").tofile(tmp_path / "raw")
    for number, make in enumerate((
        lambda file: file.__setitem__("latents", h5py.ExternalLink("other.h5", "latents")),
        lambda file: file.create_dataset("latents", (10, 4, 2, 2), "f4", external=[("raw", 0, 640)]),
        lambda file: file.create_virtual_dataset("latents", _virtual(h5py)),
    )):  # fmt: skip
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            make(file)
            file["labels"] = labels()
        assert f"{number}.h5: " in (message := refused(f"{number}.h5")) and "not opened" in message, message


def _virtual(h5py):
    layout = h5py.VirtualLayout((10, 4, 2, 2), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "latents", shape=(10, 4, 2, 2))
    return layout


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_is_executed(tmp_path, refused):
    torch.save({"mean": _Evil(), "std": torch.ones(4)}, tmp_path / "stats.pt")
    torch.save(_Evil(), tmp_path / "latents.pt")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("open('executed', 'w')")
    path = write_latents(tmp_path / "data", "tensors", latents(), labels())
    assert "refused: it holds Python objects" in refused(path, "--statistics", tmp_path / "stats.pt")
    assert "latents.pt: is a pickled file, which could execute code and is not opened" in refused("latents.pt")
    assert "script: holds no files of a known format, and its program script.py is not executed" in refused("script")
    assert "script.py: is a program, which is not executed" in refused("script/script.py")
    fast = write_latents(tmp_path / "fast", "fast_dit", latents(), labels())
    np.save(fast / "imagenet256_features" / "3.npy", np.array([_Evil()], dtype=object), allow_pickle=True)
    assert "imagenet256_features/3.npy: cannot be read as .npy: it does not hold the object" in refused("fast")
    assert not (tmp_path / "executed").exists()


def test_places_without_one_table(tmp_path, refused):
    pytest.importorskip("pyarrow"), pytest.importorskip("h5py")
    columns = {"latent": latents(4).tolist(), "label": [0, 1, 0, 1]}
    assert "none: no such file or folder; give a folder of datasets (save_to_disk), .parquet" in refused("none")
    assert "none-*.parquet: no file has a name of this pattern" in refused("none-*.parquet")
    for name in ("train-0", "test-0"):
        write_parquet(tmp_path / "splits" / f"{name}.parquet", columns)
    message = refused("splits")
    assert message == "splits: holds files of several splits (test, train); give one, such as 'splits/test*.parquet'"
    write_parquet(tmp_path / "mixed" / "a.parquet", columns)
    write_hdf5(tmp_path / "mixed" / "a.h5", {"latents": latents(), "labels": labels()})
    assert "mixed: holds files of several formats (1 .hdf5, 1 .parquet); give files of one" in refused("mixed")
    write_parquet(tmp_path / "other" / "a.parquet", columns)
    write_parquet(tmp_path / "other" / "b.parquet", {"latent": columns["latent"], "y": [0, 1, 0, 1]})
    assert "other/b.parquet: has other columns than other/a.parquet" in refused("other")
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "holds dataset_dict.json, but no splits" in refused("dict")
    (tmp_path / "dict" / "train" / "state.json").write_text("{}")
    assert refused("dict") == "dict: holds 1 splits of a data set; give one of them: dict/train"
    assert "dict/train/state.json cannot be read" in refused("dict/train")
    assert "a.h5: has no dataset.json; of HDF5, images" in refused("mixed/a.h5", kind="--images")
    save_file({"latents": torch.zeros(4, 4, 2, 2), "labels": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert "labels is torch.float32; labels are whole numbers" in refused("a.safetensors")
    save_file({"latents": torch.zeros(4, 4, 2, 2), "labels": torch.arange(3)}, tmp_path / "a.safetensors")
    assert "a.safetensors: labels has shape (3,), not (4,)" in refused("a.safetensors")
    assert "safetensors files hold latents; give them to --latents" in refused("a.safetensors", kind="--images")
    write_hdf5(tmp_path / "h.h5", {"latents": latents(), "labels": labels()[:9]})
    assert "h.h5: labels has shape (9,), not (10,)" in refused("h.h5")
    write_hdf5(tmp_path / "u.h5", {"latents": np.zeros((10, 4, 2, 2), np.uint8), "labels": labels()})
    assert "u.h5: latents is uint8 (10, 4, 2, 2), not floating-point (N, C, H, W); give --data-field" in refused("u.h5")


def test_lists_of_labels_that_are_wrong(tmp_path, refused):
    path = write_latents(tmp_path / "data", "edm2", latents(), labels())
    file = path / "dataset.json"
    listed = json.loads(file.read_text())["labels"]
    for content, message in (
        (json.dumps({"labels": [*listed, listed[3]]}), f"lists {listed[3][0]} twice; remove one of the two lines"),
        (json.dumps({"labels": [*listed[:-1], [listed[-1][0], 1.5]]}), "is not a whole number; correct it"),
        (json.dumps({"labels": [*listed[:-1], [listed[-1][0], True]]}), "is not a whole number; correct it"),
        (json.dumps({"labels": None}), "is not {"), ("[" * 9999, "is not {"), ("[]", "is not {"),
    ):  # fmt: skip
        file.write_text(content)
        assert message in refused("data") and "data/dataset.json" in refused("data")
    file.unlink()
    assert "data: holds neither dataset.json nor one folder *_features and one *_labels" in refused("data")


def test_samples_of_tars_that_are_wrong(tmp_path, refused):
    pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    write_tar(path, {"0.png": png(0), "0.cls": b"1", "1.cls": b"0"})
    assert "a.tar: sample a.tar/1 holds .cls, but not an image; complete or remove it" in refused(path, kind="--images")
    write_tar(path, {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.cls": b"\xff"})
    assert "a.tar/1.cls is not UTF-8; correct it" in refused(path, kind="--images")
    write_tar(path, {"0.png": png(0), "0.json": b"{", "1.png": png(1), "1.cls": b"0"})
    assert "a.tar/0.json is not JSON" in refused(path, kind="--images")
    write_tar(path, {"0.png": png(0), "0.cls": b"0", "0.png ": png(0), "1.png": png(1), "1.cls": b"0"})
    twice = {"0.png": png(0), "0.cls": b"0", "1.png": png(1), "1.cls": b"1"}
    write_tar(tmp_path / "b.tar", twice)
    with open(tmp_path / "b.tar", "r+b") as file:  # the second sample gets the name of the first
        content = bytearray(file.read())
    for place in (i for i in range(0, len(content), 512) if content[i : i + 5] in (b"1.png", b"1.cls")):
        content[place : place + 1] = b"0"
        content[place + 148 : place + 156] = b" " * 8
        content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    (tmp_path / "b.tar").write_bytes(content)
    assert "b.tar" in (message := refused("b.tar", kind="--images")) and "write" in message, message
    write_tar(
        path, {"0.npy": npy(latents()[0]), "0.flip.npy": npy(latents()[0]), "0.cls": b"0", "1.npy": npy(latents()[1])}
    )
    assert "1.npy lacks the latent of the mirror image, unlike the first sample" in refused(path)


def test_tables_whose_images_are_none_are_refused(tmp_path, refused):
    pytest.importorskip("pyarrow")
    columns = {"image": [b"no image", None, b"", b"x"], "label": [0, 1, 0, 1]}
    write_parquet(tmp_path / "a.parquet", columns)
    assert "none of 4 files could be read; a.parquet#3: UnidentifiedImageError" in refused("a.parquet", kind="--images")
    path = write_images(tmp_path / "images", "parquet")
    assert "has no 'picture' (--data-field); it holds image, label" in refused(
        path.relative_to(tmp_path), "--data-field", "picture", kind="--images"
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ({"mean": [0.0] * 4, "std": [1.0, 1.0, 0.0, 1.0]}, "channel 2 has mean 0 and deviation 0"),
        ({"mean": [0.0] * 4, "var": [1.0, -1.0, 1.0, 1.0]}, "channel 1 has mean 0 and deviation nan"),
        ({"mean": [0.0] * 4, "std": [1.0] * 8}, "std is float64 (8,), not a number for each of 4 channels"),
        ({"mean": np.zeros((4, 2, 2)).tolist(), "var": np.ones((4, 2, 2)).tolist()}, "mean is float64 (4, 2, 2), not"),
        ({"average": [0.0] * 4}, "holds average, but no `mean` with `std` or `var`"),
        ([], "cannot be read (it is not a JSON object)"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(content, message, tmp_path, refused):
    path = write_latents(tmp_path / "data", "tensors", latents(), labels())
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert message in refused(path, "--statistics", "s.json")


@pytest.mark.parametrize("ending", [".pt", ".npz", ".safetensors", ".json"])
def test_damaged_files_of_statistics_are_refused(ending, tmp_path, refused):
    path = write_latents(tmp_path / "data", "tensors", latents(), labels())
    file = tmp_path / f"stats{ending}"
    mean, std = torch.zeros(4), torch.ones(4)
    if ending == ".pt":
        torch.save({"mean": mean, "std": std}, file)
    elif ending == ".npz":
        np.savez(file, mean=mean.numpy(), std=std.numpy())
    elif ending == ".safetensors":
        save_file({"mean": mean, "std": std}, file)
    else:
        file.write_text(json.dumps({"mean": [0.0] * 4, "std": [1.0] * 4}))
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:20] + b"\0(" + content[22:30]):
        file.write_bytes(damaged)
        assert refused(path, "--statistics", file).startswith(f"--statistics stats{ending}: ")
    assert "no such file; give a .pt" in refused(path, "--statistics", "none.npz")


def test_statistics_of_equal_values_cannot_be_computed(tmp_path, capsys):
    values = latents()
    values[:, 2] = 0.7
    path = write_latents(tmp_path / "data", "tensors", values, labels())
    out = tmp_path / "out"
    assert main(["encode", "--latents", str(path), "--statistics", "compute", "--out", str(out)]) == 1
    assert "the latents: channel 2 has mean 0.700195 and deviation 0" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()


def test_options_that_do_not_fit_are_refused(tmp_path, capsys):
    def refused(*words) -> str:
        assert main(["encode", "--out", str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    assert "--latents needs --statistics FILE or compute, --autoencoder PATH, or --scale S" in refused("--latents", "x")
    pixels = ("--images", "x", "--autoencoder", "none")
    assert "--statistics: is for latents" in refused(*pixels, "--statistics", "compute")
    assert "--values mean_std: is for --latents" in refused("--npz", "x", "--values", "mean_std")
    assert "--label-field: is for --images and --latents" in refused("--npz", "x", "--label-field", "y")
    assert "--flip-field: is for --latents" in refused(*pixels, "--flip-field", "y")
    (tmp_path / "ant").mkdir()
    assert main(
        ["encode", "--out", str(tmp_path / "out"), "--images", str(tmp_path), *pixels[2:], "--num-classes", "3"]
    )
    assert "is a folder of classes, which their folders name and number; leave out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "library, path, sentence",
    [
        ("pyarrow", FIXTURE / "latents.parquet", "Parquet and folders of datasets need pyarrow"),
        ("h5py", "a.h5", "HDF5 files need h5py"),
        ("webdataset", "a.tar", "tars need webdataset"),
    ],
)
def test_a_missing_library_is_named(library, path, sentence, tmp_path, refused, monkeypatch):
    import sys

    (tmp_path / "a.h5").touch(), (tmp_path / "a.tar").touch()
    monkeypatch.setitem(sys.modules, library, None)
    assert refused(path) == f"{sentence}: pip install 'megapromoe[data]'"
