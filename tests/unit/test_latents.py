"""Samples of latents in files, at every layout, also beside damaged records."""

import logging
import shutil

import numpy as np
import pytest
import torch
from support.latent_folders import Arrays, damage, write

from megapromoe.data import node_cache
from megapromoe.data.datasets import DamagedRecords, DatasetError
from megapromoe.data.latents import Latents, read_manifest
from megapromoe.data.sample_stream import SampleStream
from megapromoe.data.shard_files import HEADER
from megapromoe.diffusion.noise import normals


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
