"""Copies of shards on a node."""

import threading

import numpy as np
import pytest
from support.latent_folders import damage, latents_config, write

from megapromoe.data import node_cache
from megapromoe.data.latents import LatentsError, read_manifest
from megapromoe.data.shard_files import HEADER
from megapromoe.data.sources import open_dataset


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


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
    data = open_dataset(latents_config(folder, f"data.cache={tmp_path / 'c'}"))
    path = tmp_path / "c" / data.manifest.index_sha256[:16] / "shard-00000.npy"
    content = np.load(folder / "shard-00000.npy")
    with open(folder / "shard-00000.npy", "r+b") as file:
        file.write(b"\0" * HEADER + b"\0" * content.nbytes)  # the original is gone, but the copy is good
    assert path.stat().st_size == HEADER + content.nbytes
    assert np.array_equal(data.raw(3), content[3])
