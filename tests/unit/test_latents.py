"""Latents on disk: sampling, damaged records on every layout, and error messages."""

import hashlib
import json
import logging
import os
import shutil
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.fuzz import NAMED, SILENT, Target, outcome_of
from support.fuzz import damage as fuzz
from support.latent_folders import Arrays, damage, write

from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError, data_identity
from megapromoe.cli import main
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.data import node_cache
from megapromoe.data.datasets import DamagedRecords, DatasetError
from megapromoe.data.latents import HEADER, Latents, LatentsError, check, read_manifest, scaled_deviation
from megapromoe.data.sample_stream import SampleStream
from megapromoe.data.sources import autoencoder_identity, open_dataset
from megapromoe.diffusion.noise import normals
from megapromoe.io import sha256_of_json


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


def loader(data, flip=True, seed=1):
    return SampleStream(data, seed, 0.3, flip, data.num_classes)


def in_stream_order(*batches):
    order = torch.cat([batch.positions_B for batch in batches]).argsort()
    return {
        name: torch.cat([getattr(batch, name) for batch in batches])[order]
        for name in ("clean_BCHW", "noise_BCHW", "labels_B", "positions_B")
    }


def config(path, *overrides, size=4, channels=2, classes=4):
    settings = (f"data.path={path}", f"model.input_size={size}", f"model.in_channels={channels}", "data.flip=true")
    more = (f"model.num_classes={classes}", "train.global_batch=8", "data.source=latents", "train.warmup=0")
    return resolve("digits", overrides=[*settings, *more, *overrides])


# Drawing


def test_shards_are_plain_arrays_and_a_sample_is_the_formula_of_them(folder):
    data = Latents(folder)
    shards = [np.load(folder / shard.file, mmap_mode="r", allow_pickle=False) for shard in data.manifest.shards]
    assert [len(shard) for shard in shards] == [16, 16, 8] and shards[0].shape[1:] == (2, 2, 2, 4, 4)
    records = np.concatenate(shards)
    indices, mirror = np.array([39, 0, 16, 15, 7]), np.array([True, False, True, False, False])
    normal = normals(3, "any", np.arange(5), (2, 4, 4))
    scale, shift = np.array([0.5, 1.5])[:, None, None], np.array([0.0, 0.25])[:, None, None]
    for row, (index, view) in enumerate(zip(indices, mirror.astype(int), strict=True)):
        mean, logvar = records[index, view]
        sample = (mean + np.exp(logvar / 2) * normal[row] - shift) * scale
        drawn = data.sample(indices, mirror, normal)
        assert drawn.dtype == np.float32 and np.allclose(drawn[row], sample, rtol=1e-5, atol=1e-6)
        assert np.allclose(data.sample(indices, mirror, None)[row], (mean - shift) * scale, rtol=1e-6)
    assert np.array_equal(data.labels[indices], indices % 4) and data.name(16) == "class0/0016.png"
    means, labels = data.read(indices)
    assert np.array_equal(means, data.sample(indices, np.zeros(5, bool), None)) and labels.tolist() == [3, 0, 0, 3, 3]
    assert np.array_equal(data.raw(17), Arrays().record(Arrays().scan.items[17]))


def test_pixels_are_mirrored_when_read(tmp_path):
    data = Latents(write(tmp_path / "p", Arrays(stochastic=False, mirror="exact")))
    plain, mirrored = (data.sample(np.arange(3), np.full(3, view), None) for view in (False, True))
    assert np.array_equal(mirrored, plain[..., ::-1]) and not np.array_equal(mirrored, plain)


def test_a_sample_belongs_to_its_position_at_every_layout(folder):
    stream = loader(Latents(folder))
    full = in_stream_order(stream.batch(30, 20))  # over the end of an epoch
    parts = in_stream_order(stream.batch(30, 7), stream.batch(37, 13))
    assert all(torch.equal(full[name], parts[name]) for name in full)
    again = in_stream_order(loader(Latents(folder), seed=2).batch(30, 20))
    assert not torch.equal(full["clean_BCHW"], again["clean_BCHW"])


def test_a_position_draws_with_noise_of_its_own(folder):
    """What the posterior adds is unit normal, differs from epoch to epoch, and is not the noise of diffusion."""
    data = Latents(folder)
    stream = loader(data, flip=False)
    batch = in_stream_order(stream.batch(0, 4000))
    indices = stream.indices(np.arange(4000))
    records = np.stack([data.raw(index)[0] for index in range(40)])
    scale, shift = np.array(data.manifest.scale)[:, None, None], np.array(data.manifest.shift)[:, None, None]
    raw = batch["clean_BCHW"].numpy() / scale + shift
    epsilon = (raw - records[indices, 0]) / np.exp(0.5 * records[indices, 1])
    assert epsilon.mean() == pytest.approx(0, abs=5 / np.sqrt(epsilon.size))
    assert epsilon.std() == pytest.approx(1, abs=5 / np.sqrt(2 * epsilon.size))
    between = np.corrcoef(epsilon.ravel(), batch["noise_BCHW"].numpy().ravel())[0, 1]
    assert abs(between) < 5 / np.sqrt(epsilon.size)
    same = np.flatnonzero(indices == 5)
    assert len(same) == 100 and abs(np.corrcoef(epsilon[same].reshape(100, -1)) - np.eye(100)).max() < 0.9


# Damage


def test_a_damaged_record_is_named_and_replaced_by_the_next_of_the_epoch(folder, caplog):
    good = loader(Latents(folder))
    order = good.indices(np.arange(80))
    path = damage(folder, 1, 3)  # record 19
    following = int(order[(np.flatnonzero(order[:40] == 19)[0] + 1) % 40])
    damage(folder, *divmod(following, 16))
    data = Latents(folder)
    bad = [index for index in range(40) if data._record(index)[1]]
    assert bad == sorted([19, following])
    with caplog.at_level(logging.WARNING):
        batches = [loader(Latents(folder)).batch(0, 40), loader(Latents(folder)).batch(40, 40)]
    assert f"{path}, record 3 (class3/0019.png) is damaged" in caplog.text
    assert sum(batch.damaged for batch in batches) == 2 * len(bad)
    samples = in_stream_order(*batches)
    expected = in_stream_order(good.batch(0, 80))
    for position in range(80):
        if order[position] not in bad:
            assert torch.equal(samples["clean_BCHW"][position], expected["clean_BCHW"][position])
            continue
        epoch = order[position // 40 * 40 :][:40]
        place = position % 40
        while epoch[place] in bad:
            place = (place + 1) % 40
        normal = normals(1, "posterior", np.array([position]), data.shape)
        drawn = [data.sample(epoch[[place]], np.array([view]), normal)[0] for view in (False, True)]
        assert any(np.array_equal(samples["clean_BCHW"][position], d) for d in drawn)
    parts = [loader(Latents(folder)).batch(first, 5) for first in range(0, 80, 5)]
    assert torch.equal(in_stream_order(*parts)["clean_BCHW"], samples["clean_BCHW"])
    assert sum(batch.damaged for batch in parts) == 2 * len(bad)


def test_damage_is_seen_on_the_last_byte_and_in_a_shard_cut_off_later(folder):
    data = Latents(folder)
    damage(folder, 0, 0, byte=data.manifest.record_bytes - 1)
    assert Latents(folder, verify=False).sample(np.array([0]), np.zeros(1, bool), None).shape == (1, 2, 4, 4)
    with open(folder / data.manifest.shards[2].file, "r+b") as file:
        file.truncate(HEADER + 100)
    with pytest.raises(DamagedRecords) as error:
        data.sample(np.array([1, 0, 39]), np.zeros(3, bool), None)
    assert error.value.rows == [1, 2]


def test_nothing_usable_is_an_error_not_a_loop(tmp_path):
    folder = write(tmp_path / "latents", Arrays(count=3, classes=1))
    for place in range(3):
        damage(folder, 0, place)
    with pytest.raises(DatasetError, match="none of 3 records can be used; .*record [012] is damaged"):
        loader(Latents(folder)).batch(0, 2)


def test_a_damaged_copy_is_read_from_the_original(folder, tmp_path, caplog):
    copies = node_cache.cache_shards(folder, tmp_path / "cache", read_manifest(folder))
    shutil.copy(folder / "manifest.json", copies)
    path = damage(copies, 0, 2)
    with caplog.at_level(logging.WARNING):
        drawn = Latents(folder, copies).sample(np.array([2]), np.zeros(1, bool), None)
    assert str(path) in caplog.text and np.array_equal(
        drawn, Latents(folder).sample(np.array([2]), np.zeros(1, bool), None)
    )
    damage(folder, 0, 2)
    with pytest.raises(DamagedRecords):
        Latents(folder, copies).sample(np.array([2]), np.zeros(1, bool), None)


# Opening


def test_files_that_are_not_right_are_all_named(folder):
    (folder / "shard-00000.npy").unlink()
    with open(folder / "shard-00002.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(LatentsError) as error:
        Latents(folder)
    for part in ("shard-00000.npy cannot be opened: No such file", "shard-00002.npy has 4,228 bytes, not 4,224"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"dtype": "float64"}, "is damaged: .*dtype"),
        ({"scale": [1.0]}, "is damaged: .*scale"),
        ({"surplus": 1}, "'surplus'. are missing or unknown"),
        ({"shards": [{"file": "../../etc/passwd", "records": 1, "sha256": ""}]}, "is damaged"),
        ({"shards": 3}, "is damaged"),
        ({"shards": [{"file": "..", "records": 1, "sha256": ""}]}, "is damaged: .*files of this folder"),
        ({"shards": [{"file": 7, "records": 1, "sha256": ""}]}, "is damaged: .*files of this folder"),
        ({"shards": [{"file": "a.npy", "records": -1, "sha256": ""}]}, "is damaged: .*not a whole number"),
        ({"shards": [{"file": "a.npy", "records": 1, "sha256": ""}] * 2}, "is damaged: .*different files"),
        ({"shape": [2, 4.0, 4]}, "is damaged: shape"),
        ({"shape": [2, -4, 4]}, "is damaged: shape"),
        ({"shift": ["0", "0"]}, "is damaged: shift"),
        ({"scale": [float("nan"), 1.0]}, "is damaged: scale"),
        ({"stochastic": 1}, "is damaged: .*stochastic"),
        ({"class_names": [1, 2]}, "is damaged: class_names"),
        ({"rounding": "0.1"}, "is damaged: rounding"),
    ],
)
@pytest.mark.parametrize("hashed", [True, False])
def test_a_manifest_that_is_none_is_refused(folder, change, message, hashed):
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | change
    del content["sha256"]
    path.write_text(json.dumps(content | ({"sha256": sha256_of_json(content)} if hashed else {})))
    with pytest.raises(LatentsError, match=message):
        Latents(folder)


def test_the_error_for_a_folder_without_manifest_gives_the_remedy(tmp_path, folder):
    with pytest.raises(LatentsError, match="holds no manifest.json; create it with megapromoe encode"):
        Latents(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(LatentsError, match="is not finished: repeat megapromoe encode"):
        Latents(folder)


def test_a_changed_index_is_refused(folder):
    path = folder / "index.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LatentsError, match="index.safetensors is damaged"):
        Latents(folder)


def test_opened_by_the_configuration(folder, tmp_path):
    assert len(open_dataset(config(folder))) == 40
    with pytest.raises(DatasetError, match="data.test_path is empty"):
        open_dataset(config(folder), "test")
    other = write(tmp_path / "test", Arrays(count=12))
    assert len(open_dataset(config(folder, f"data.test_path={other}"), "test")) == 12
    assert autoencoder_identity(config(folder))["name"] == "some/vae"
    assert autoencoder_identity(resolve("digits")) is None
    with pytest.raises(DatasetError) as error:
        open_dataset(config(folder, channels=4, size=8, classes=3))
    for part in ("records have shape (2, 4, 4)", "model.in_channels=2", "set model.num_classes=4"):
        assert part in str(error.value)
    with pytest.raises(DatasetError, match="40 records, fewer than train.global_batch = 64"):
        open_dataset(config(folder, "train.global_batch=64"))
    single = write(tmp_path / "single", Arrays(mirror="none"))
    with pytest.raises(DatasetError, match="holds no mirrored latents; set data.flip=false"):
        open_dataset(config(single))
    assert len(open_dataset(config(single, "data.flip=false"))) == 40


def test_data_options_that_are_missing_or_not_used_are_refused():
    with pytest.raises(ConfigError, match="data.path = '': must be the folder of the latents"):
        resolve("digits", overrides=["data.source=latents"])
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=["data.cache=/x", "data.path=/y", "data.test_path=/z"])
    assert len(error.value.violations) == 3 and "must be empty with data.source = 'digits'" in str(error.value)


# Hashes


def test_a_changed_manifest_is_refused_and_one_without_hash_read_with_a_notice(folder, caplog):
    path = folder / "manifest.json"
    caplog.set_level("INFO")
    text, identity = path.read_text(), read_manifest(folder).identity
    assert json.loads(text)["sha256"] == identity and "no hash" not in caplog.text
    path.write_text(json.dumps(json.loads(text), sort_keys=True))
    assert read_manifest(folder).identity == identity, "another layout of the text"
    path.write_text(text.replace(" 0.5,", " 1.5,", 1))
    with pytest.raises(LatentsError, match=r"manifest.json is damaged: it does not match its hash; restore it from a"):
        Latents(folder)
    content = json.loads(text)
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert read_manifest(folder).identity == identity and "and has no hash" in caplog.text


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", "shard-00001.npy"])
def test_a_pipe_in_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(LatentsError, match=f"{name} is not a regular file"):
        Latents(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "\0", ""], ids=range(5))
def test_a_manifest_of_another_kind_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(LatentsError, match="manifest.json"):
        read_manifest(folder)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_no_flipped_bit_is_silent(tmp_path, count):
    folder = write(tmp_path / "latents", Arrays(count=6, classes=2, shape=(2, 2, 2)), shard_size=4)

    def state():
        if problems := check(folder):
            raise LatentsError("; ".join(problems))
        data = Latents(folder)
        records = [(data.raw(index).tolist(), data.name(index)) for index in range(6)]
        return data.manifest, data.labels.tolist(), records

    expected = state()
    files = [folder / name for name in ("manifest.json", "index.safetensors", "shard-00000.npy", "shard-00001.npy")]
    tally = fuzz(Target("latents", files, lambda _: outcome_of(state, LatentsError, expected)), count, count)
    assert tally.outcomes[SILENT] == 0 and tally.outcomes[NAMED] >= 0.8 * tally.total, tally
    assert tally.flips == count < tally.total


def test_the_deviation_after_scaling_is_that_of_what_a_model_is_given(folder):
    data = Latents(folder)
    values = data.read(np.arange(40))[0]
    deviation, records = scaled_deviation(folder)
    assert records == 40 and deviation == pytest.approx(values.std(), rel=1e-6)
    damage(folder, 1, 3)
    assert scaled_deviation(folder)[1] == 39


def test_check_prints_the_scale_and_shows_latents_that_were_scaled_before(tmp_path, capsys):
    source = Arrays(stochastic=False)
    assert main(["data", "check", str(write(tmp_path / "raw", source))]) == 0
    shown = capsys.readouterr().out
    assert "scale 0.5, 1.5, shift 0, 0.25" in shown and "standard deviation after scaling: 1." in shown
    assert "(40 records)" in shown and "warning" not in shown
    source.manifest_fields |= {"scale": (0.18215, 0.18215), "shift": (0.0, 0.0)}
    assert main(["data", "check", str(write(tmp_path / "scaled before", source))]) == 0
    shown = capsys.readouterr().out
    assert "scale 0.18215, shift 0\n" in shown and "standard deviation after scaling: 0.18" in shown
    assert "warning: a model expects about 1" in shown and "stored scaled need scale 1" in shown


def test_a_run_records_its_data_set(folder, tmp_path):
    run, settings = tmp_path / "run", config(folder)
    RunDirectory.open(run, settings, 1).close()
    RunDirectory.open(run, settings, 1).close()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    shutil.rmtree(folder)
    write(folder, Arrays(count=41))
    for start in (lambda: RunDirectory.open(run, settings, 1), lambda: RunDirectory(run).state(settings)):
        with pytest.raises(RunDirectoryError, match=r"data.path = .*holds other data than this run .*--allow data"):
            start()
    assert RunDirectory(run).state(settings, ["data"]).endswith(": continues")
    shutil.copytree(run, tmp_path / "no step")
    (tmp_path / "no step" / "metrics.jsonl").unlink()
    assert "becomes a new run with the new config (different: the data)" in RunDirectory(tmp_path / "no step").state(
        settings
    )
    with RunDirectory.open(tmp_path / "no step", settings, 1) as anew:
        assert anew.origin(settings).data == data_identity(settings)
    RunDirectory.open(run, settings, 1, ["data"]).close()
    RunDirectory.open(run, settings, 1).close()
    entries = json.loads((run / "environment.json").read_text())
    assert [entry["data"] for entry in entries[2:]] == [read_manifest(folder).identity] * 2
    assert entries[0]["data"] == entries[1]["data"] != entries[2]["data"]


# Checking


def test_check_reads_every_record_and_reports_nothing_for_intact_data(folder):
    read = []
    assert check(folder, read.append) == [] and sum(read) == 40 * read_manifest(folder).record_bytes


def test_check_lists_everything(folder):
    path = damage(folder, 1, 3)
    header = damage(folder, 2, 0, byte=-1)  # the last byte of the header
    assert check(folder) == [
        f"{path}, record 3 (class3/0019.png): wrong checksum",
        f"{header}: its header is not that of 8 records",
    ]


def test_check_finds_what_checksums_hide(folder):
    """Values that are not finite, and an empty class, written with checksums that fit."""
    manifest, index = read_manifest(folder), load_file(folder / "index.safetensors")
    path = folder / "shard-00001.npy"
    shard = np.load(path, mmap_mode="r+")
    shard[4, 1, 0, 0, 0, 0] = np.nan
    shard.flush()
    index["crc32"][20] = zlib.crc32(shard[4].tobytes())
    index["labels"][index["labels"] == 2] = 1
    save_file(index, folder / "index.safetensors")
    index_sha256 = hashlib.sha256((folder / "index.safetensors").read_bytes()).hexdigest()
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    changed = replace(manifest, index_sha256=index_sha256, shards=tuple(shards))
    (folder / "manifest.json").write_text(changed.to_json())
    assert check(folder) == ["class 'class 2' has no record", f"{path}, record 4 (class0/0020.png): not finite"]


def test_check_compares_the_sha256(folder):
    manifest = read_manifest(folder)
    shards = (replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:])
    (folder / "manifest.json").write_text(replace(manifest, shards=shards).to_json())
    assert check(folder) == [f"{folder / 'shard-00000.npy'}: its SHA-256 differs from that in the manifest"]


# A node's own copy


def test_a_node_copies_once(folder, tmp_path, monkeypatch):
    copied, manifest = [], read_manifest(folder)
    original = node_cache._copy
    monkeypatch.setattr(node_cache, "_copy", lambda *a: (copied.append(a[0].name), original(*a)))
    ranks = [
        threading.Thread(target=node_cache.cache_shards, args=(folder, tmp_path / "c", manifest)) for _ in range(4)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert sorted(copied) == [shard.file for shard in manifest.shards]
    copies = node_cache.cache_shards(folder, tmp_path / "c", manifest)
    for shard in manifest.shards:
        assert (copies / shard.file).read_bytes() == (folder / shard.file).read_bytes()
    (folder / "shard-00001.npy").rename(tmp_path / "away")
    (copies / "shard-00001.npy").unlink()
    with pytest.raises(LatentsError, match="data.cache = .*No such file.*shard-00001.npy"):
        node_cache.cache_shards(folder, tmp_path / "c", manifest)


def test_a_copy_that_differs_does_not_take_its_name(folder, tmp_path):
    damage(folder, 1, 0)
    with pytest.raises(
        LatentsError, match="shard-00001.npy: its SHA-256 differs from that in the manifest; .* data check"
    ):
        node_cache.cache_shards(folder, tmp_path / "c", read_manifest(folder))
    assert not list((tmp_path / "c").rglob("shard-00001*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(LatentsError, match="data.cache = .*or remove data.cache"):
        node_cache.cache_shards(folder, tmp_path / "file", read_manifest(folder))


def test_a_cache_without_locks_is_named(folder, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(node_cache.fcntl, "flock", none)
    with pytest.raises(
        LatentsError,
        match=f"No locks available: {tmp_path}/c/.*; choose another folder, or remove data.cache",
    ):
        node_cache.cache_shards(folder, tmp_path / "c", read_manifest(folder))


def test_the_cache_of_the_configuration_is_read(folder, tmp_path):
    data = open_dataset(config(folder, f"data.cache={tmp_path / 'c'}"))
    path = tmp_path / "c" / data.manifest.index_sha256[:16] / "shard-00000.npy"
    content = np.load(folder / "shard-00000.npy")
    with open(folder / "shard-00000.npy", "r+b") as file:
        file.write(b"\0" * HEADER + b"\0" * content.nbytes)  # the original is gone, but the copy is good
    assert path.stat().st_size == HEADER + content.nbytes
    assert np.array_equal(data.raw(3), content[3])
