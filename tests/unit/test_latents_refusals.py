"""Folders of latents that are refused: missing files, wrong manifests, changed hashes, other data of a run."""

import json
import os
import shutil

import pytest
from support.fuzz import NAMED, SILENT, Target, outcome_of
from support.fuzz import damage as fuzz
from support.latent_folders import Arrays, latents_config, write

from megapromoe.checkpoint.data_identity import data_identity
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import DatasetError
from megapromoe.data.latents import Latents, LatentsError, check, read_manifest
from megapromoe.data.sources import autoencoder_identity, open_dataset
from megapromoe.io import sha256_of_json


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


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
    assert len(open_dataset(latents_config(folder))) == 40
    with pytest.raises(DatasetError, match="data.test_path is empty"):
        open_dataset(latents_config(folder), "test")
    other = write(tmp_path / "test", Arrays(count=12))
    assert len(open_dataset(latents_config(folder, f"data.test_path={other}"), "test")) == 12
    assert autoencoder_identity(latents_config(folder))["name"] == "some/vae"
    assert autoencoder_identity(resolve("digits")) is None
    with pytest.raises(DatasetError) as error:
        open_dataset(latents_config(folder, channels=4, size=8, classes=3))
    for part in ("records have shape (2, 4, 4)", "model.in_channels=2", "set model.num_classes=4"):
        assert part in str(error.value)
    with pytest.raises(DatasetError, match="40 records, fewer than train.global_batch = 64"):
        open_dataset(latents_config(folder, "train.global_batch=64"))
    single = write(tmp_path / "single", Arrays(mirror="none"))
    with pytest.raises(DatasetError, match="holds no mirrored latents; set data.flip=false"):
        open_dataset(latents_config(single))
    assert len(open_dataset(latents_config(single, "data.flip=false"))) == 40


def test_data_options_that_are_missing_or_not_used_are_refused():
    with pytest.raises(ConfigError, match="data.path = '': must be the folder of the latents"):
        resolve("digits", overrides=["data.source=latents"])
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=["data.cache=/x", "data.path=/y", "data.test_path=/z"])
    assert len(error.value.violations) == 3 and "must be empty with data.source = 'digits'" in str(error.value)


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


def test_a_run_records_its_data_set(folder, tmp_path):
    run, settings = tmp_path / "run", latents_config(folder)
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
    with RunDirectory.open(tmp_path / "no step", settings, 1) as new_run:
        assert new_run.origin(settings).data == data_identity(settings)
    RunDirectory.open(run, settings, 1, ["data"]).close()
    RunDirectory.open(run, settings, 1).close()
    entries = json.loads((run / "environment.json").read_text())
    assert [entry["data"] for entry in entries[2:]] == [read_manifest(folder).identity] * 2
    assert entries[0]["data"] == entries[1]["data"] != entries[2]["data"]
