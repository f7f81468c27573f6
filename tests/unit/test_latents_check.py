"""`megapromoe data check`: every record, what checksums hide, and the scale."""

import hashlib
import zlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.latent_folders import Arrays, damage, write

from megapromoe.cli import main
from megapromoe.data.latents import Latents, check, read_manifest, scaled_deviation


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


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
