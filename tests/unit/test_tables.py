"""Tables: each format of users is read as it is, written at any number of ranks, and normalised by channel."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.latent_folders import write
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
from megapromoe.data.encode import encode as encode_source
from megapromoe.data.latents import Latents
from megapromoe.data.table_latents import TableLatents
from megapromoe.data.tables.classes import table_scan
from megapromoe.data.tables.opening import open_table
from megapromoe.data.tables.table import IMAGES, LATENTS, Fields, FilesTable

pytestmark = pytest.mark.usefixtures("impatient")
LIBRARY = {
    "parquet": "pyarrow",
    "npy_column": "pyarrow",
    "tensor_column": "pyarrow",
    "hdf5": "h5py",
    "edm2_hdf5": "h5py",
}


def source(path: Path, fields: Fields = Fields(), values: str = "", **options) -> TableLatents:  # noqa: B008
    table = open_table(path, LATENTS, fields)
    return TableLatents(table, table_scan(table), values, dtype="float32", **options)


def encode(*words) -> int:
    return main(["encode", *map(str, words), "--dtype", "float32"])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_it_is_on_any_number_of_ranks(form, tmp_path):
    pytest.importorskip(LIBRARY.get(form, "numpy"))
    values, of = latents(12), labels(12)
    path = write_latents(tmp_path / form, form, values, of)
    outputs = [
        write(tmp_path / f"out{world}", source(path), world, shard_size=4) for world in (1, 3)
    ]  # shards cross the two files and the row groups
    assert len({(output / "manifest.json").read_bytes() for output in outputs}) == 1
    data = Latents(outputs[0])
    assert data.shape == (4, 2, 2) and data.class_names == ("0", "1", "2") and data.labels.tolist() == of
    assert not data.stochastic and data.manifest.mirror == "none"
    assert np.array_equal(data.read(np.arange(12))[0], values)
    assert len({data.name(row) for row in range(12)}) == 12


def test_files_that_datasets_has_written(tmp_path):
    pytest.importorskip("pyarrow")
    expected = np.load(FIXTURE / "latents.npy")
    for name in ("latents", "latents.parquet"):
        data = Latents(write(tmp_path / f"{name}.out", source(FIXTURE / name)))
        assert np.array_equal(data.read(np.arange(6))[0], expected) and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (
        encode("--images", FIXTURE / "images", "--autoencoder", "none", "--resolution", 8, "--out", tmp_path / "i") == 0
    )
    data = Latents(tmp_path / "i")
    assert data.class_names == ("ant", "bee", "cat") and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [data.raw(row)[0, 0, :, 0, 0].tolist() for row in (0, 5)] == [[0, 20, 255], [50, 20, 205]]


@pytest.mark.parametrize("form", ["parquet", "tar", "edm2_hdf5"])
def test_images_with_labels_are_encoded_and_what_is_none_is_listed(form, tmp_path, capsys):
    pytest.importorskip({"parquet": "pyarrow", "tar": "webdataset", "edm2_hdf5": "h5py"}[form])
    path = write_images(tmp_path / "data", form)
    out = tmp_path / "out"
    call = ("--images", path, "--autoencoder", "none", "--resolution", 8, "--batch", 3, "--shard-size", 4, "--out", out)
    assert encode(*call) == 0
    data = Latents(out)
    kept = [i for i in range(10) if i != 2]
    assert data.labels.tolist() == [i % 3 for i in kept]
    assert data.class_names == (("0", "1", "2") if form == "edm2_hdf5" else ("ant", "bee", "cat"))
    for row, number in enumerate(kept):
        pixels = np.asarray(Image.open(BytesIO(png(number, 8)))).transpose(2, 0, 1)
        assert np.array_equal(data.raw(row)[0, 0], pixels)
    ((name, reason),) = data.manifest.skipped
    assert "cannot identify image file" in reason and name not in {data.name(row) for row in range(9)}


def test_names_are_found_or_given(tmp_path):
    pytest.importorskip("h5py")
    values, of = latents(), labels()
    sets = {"train/z0": values, "train/latents_flip": values[..., ::-1], "classes_of": of, "other": np.zeros(3)}
    path = write_hdf5(tmp_path / "a.h5", sets)
    fields = Fields("train/z0", "classes_of", "train/latents_flip")
    data = Latents(write(tmp_path / "out", source(path, fields)))
    assert data.manifest.mirror == "stored"
    drawn = data.sample(np.arange(10), np.arange(10) % 2 == 1, None)
    assert np.array_equal(drawn, np.where(np.arange(10)[:, None, None, None] % 2, values[..., ::-1], values))


def test_shards_of_vavae_with_their_statistics(tmp_path, capsys):
    """32 channels in bfloat16, mirrored latents, and latents_stats.pt as LightningDiT writes it."""
    values = torch.from_numpy(latents(10, (32, 2, 2))).bfloat16()
    folder = tmp_path / "vavae"
    folder.mkdir()
    for rank in range(2):
        part = values[rank * 5 : rank * 5 + 5]
        content = {"latents": part, "latents_flip": part.flip(-1).contiguous(), "labels": torch.tensor(labels()[:5])}
        save_file(content, folder / f"latents_rank{rank:02d}_shard000.safetensors")
    mean, std = values.float().mean((0, 2, 3), keepdim=True), values.float().std((0, 2, 3), keepdim=True)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    out = tmp_path / "out"
    call = ("--latents", folder, "--statistics", folder / "latents_stats.pt", "--resolution", 256, "--out", out)
    assert encode(*call) == 0
    data = Latents(out)
    assert data.shape == (32, 2, 2) and data.manifest.mirror == "stored" and data.manifest.resolution == 256
    assert data.manifest.autoencoder["normalisation"] == "of latents_stats.pt"
    expected = ((values.float() - mean) / std).numpy()
    assert np.allclose(data.read(np.arange(10))[0], expected, atol=1e-5)
    raw = data.read(np.arange(10))[0] / data._scale + data._shift
    assert np.allclose(raw, values.float().numpy(), atol=1e-4), "what a sampler does with generated latents"
    assert main(["data", "check", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "32x2x2 float32" in printed and "standard deviation after scaling: 0.987" in printed
    assert "each channel is normalised: of latents_stats.pt" in printed and " by channel, shift " in printed


@pytest.mark.parametrize("world", [1, 3])
def test_computed_statistics_are_those_of_all_records(world, tmp_path):
    values = latents(11, (16, 2, 2))
    path = write_latents(tmp_path / "data", "tensors", values, labels(11))
    read = source(path, scale=0.5)
    out = write(tmp_path / "out", read, world, shard_size=4, normalises=True)
    data = Latents(out)
    mean, deviation = values.mean((0, 2, 3), dtype=np.float64), values.std((0, 2, 3), dtype=np.float64)
    assert np.allclose(data.manifest.shift, mean) and np.allclose(data.manifest.scale, 0.5 / deviation)
    drawn = data.read(np.arange(11))[0].astype(np.float64)
    assert np.allclose(drawn.mean((0, 2, 3)), 0, atol=1e-5) and np.allclose(drawn.std((0, 2, 3)), 0.5, atol=1e-5)
    assert data.manifest.autoencoder["normalisation"] == "computed from these latents"


def test_computed_statistics_are_those_of_samples_of_a_posterior(tmp_path):
    moments = np.concatenate([latents(200), np.full((200, 4, 2, 2), np.log(4.0), np.float32)], axis=1)
    path = write_latents(tmp_path / "data", "tensors", moments, labels(200))
    data = Latents(write(tmp_path / "out", source(path, values="posterior"), shard_size=50, normalises=True))
    mean, variance = moments[:, :4].mean((0, 2, 3)), moments[:, :4].var((0, 2, 3)) + 4.0
    assert np.allclose(data.manifest.shift, mean, atol=1e-5)
    assert np.allclose(data.manifest.scale, 1 / np.sqrt(variance), rtol=1e-4)


def test_means_with_deviations_are_stored_as_posteriors(tmp_path):
    """EDM2's and REPA's latents: `img-mean-std-*.npy` hold a mean above a standard deviation."""
    moments = np.concatenate([latents(), np.abs(latents(seed=1)) + 0.1], axis=1)
    path = write_latents(tmp_path / "data", "edm2", moments, labels())
    for file in sorted((path / "00000").iterdir()):
        file.rename(file.with_name(file.name.replace("img-", "img-mean-std-")))
    listed = (path / "dataset.json").read_text()
    (path / "dataset.json").write_text(listed.replace("img-", "img-mean-std-"))
    data = Latents(write(tmp_path / "out", source(path, scale=2.0)))
    assert data.stochastic and data.shape == (4, 2, 2)
    normal = np.random.default_rng(3).standard_normal((10, 4, 2, 2)).astype(np.float32)
    drawn = data.sample(np.arange(10), np.zeros(10, bool), normal)
    assert np.allclose(drawn, (moments[:, :4] + moments[:, 4:] * normal) * 2, atol=1e-4)


def test_labels_are_numbered_by_their_names(tmp_path):
    pytest.importorskip("pyarrow")
    columns = {"latent": latents(6).tolist(), "cls": ["10", "2", "1", "10", "2", "1"]}
    table = open_table(write_parquet(tmp_path / "a.parquet", columns), LATENTS)
    scanned = table_scan(table)
    assert scanned.class_names == ("1", "10", "2") and [item.label for item in scanned.items] == [1, 2, 0, 1, 2, 0]
    assert "--class-order number takes their value" in scanned.notes[0]
    by_value = table_scan(table, class_order="number")
    assert by_value.class_names == ("1", "2", "10") and [item.label for item in by_value.items] == [2, 1, 0] * 2
    assert table_scan(table, one_class=True).class_names == ("a",)
    numbers = open_table(write_parquet(tmp_path / "n.parquet", columns | {"cls": [0, 2, 2, 0, 2, 0]}), LATENTS)
    assert table_scan(numbers).class_names == ("0", "1", "2")
    assert table_scan(numbers).notes == ("1 of 3 classes have no record, such as class 1 (1)",)
    assert len(table_scan(numbers, num_classes=1000).class_names) == 1000


def test_json_gives_labels_in_tars(tmp_path):
    pytest.importorskip("webdataset")
    members = {}
    for i in range(4):
        members |= {f"{i}.jpg": png(i), f"{i}.json": json.dumps({"label": i % 2, "caption": "x"}).encode()}
    table = open_table(write_tar(tmp_path / "a.tar", members), IMAGES)
    assert [item.label for item in table_scan(table).items] == [0, 1, 0, 1]
    assert list(table.values(2, 3)) == [[png(2)]]
    latent = {f"{i}.npy": npy(latents()[i]) for i in range(4)} | {f"{i}.flip.npy": npy(latents()[i]) for i in range(4)}
    assert open_table(write_tar(tmp_path / "b.tar", dict(sorted(latent.items()))), LATENTS).views == 2


def test_an_interrupted_import_continues(tmp_path):
    values = latents(10)
    path = write_latents(tmp_path / "data", "tensors", values, labels(10))

    class Dying(TableLatents):
        def records(self, items):
            if items[0].row >= 4:
                raise KeyboardInterrupt
            return super().records(items)

    table = open_table(path, LATENTS)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_source(Dying(table, table_scan(table), dtype="float32"), out, shard_size=4, normalises=True)
    assert not (out / "manifest.json").exists() and (out / "part-00000.json").exists()
    before = (out / "shard-00000.npy").stat().st_mtime_ns
    data = Latents(write(out, source(path), shard_size=4, normalises=True))
    assert (out / "shard-00000.npy").stat().st_mtime_ns == before
    uninterrupted = Latents(write(tmp_path / "whole", source(path), shard_size=4, normalises=True))
    assert data.manifest == uninterrupted.manifest


def test_a_pattern_takes_the_files_of_one_split(tmp_path):
    pytest.importorskip("pyarrow")
    columns = {"latent": latents(4).tolist(), "label": [0, 1, 0, 1]}
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / f"{name}.parquet", columns)
    table = open_table(tmp_path / "train-*.parquet", LATENTS)
    assert len(table) == 8 and isinstance(table, FilesTable) and table.name(5) == "train-1.parquet#1"
