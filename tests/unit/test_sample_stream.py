"""The stream of samples: fixed by seed and position, statistically sound, ordered [conditional | null]."""

import gzip
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import DatasetError, Digits, Synthetic, check_dataset
from megapromoe.data.fashion import FOLDER, FashionMNIST
from megapromoe.data.sample_stream import Batch, SampleStream, prefetch
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.noise import normals, permutation, raw_bits, uniforms

NULL = 10


def stream_of(size=20, seed=1, condition_dropout=0.3, flip=True, shape=(2, 4, 4)):
    return SampleStream(Synthetic(shape, NULL, size, seed=5), seed, condition_dropout, flip, NULL)


def in_stream_order(*batches):
    """Tensors of some batches, by name, put into the order of the stream."""
    joined = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("clean_BCHW", "noise_BCHW", "u_B", "labels_B", "positions_B")
    }
    order = joined["positions_B"].argsort()
    return {name: value[order] for name, value in joined.items()}


def assert_same(a, b):
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


# Random numbers


def test_bits_are_philox_of_the_hashed_key_and_never_change():
    """A stream that moves would break every resumed run: these words are part of the format."""
    words = raw_bits(0, "noise", np.array([0, 7]), 5)[:, 4]
    assert [hex(word) for word in words.tolist()] == ["0x88f87e8cc0ace972", "0x8b579afa3c68a0a9"]


def test_numbers_of_a_position_do_not_depend_on_the_other_positions():
    full = raw_bits(3, "noise", np.arange(50), 9)
    assert len(np.unique(full)) == full.size
    scattered = np.array([7, 8, 9, 3, 49, 0, 3])
    assert np.array_equal(raw_bits(3, "noise", scattered, 9), full[scattered])
    far = 2**62
    assert np.array_equal(raw_bits(3, "noise", [far, far + 1], 9)[1:], raw_bits(3, "noise", [far + 1], 9))
    assert raw_bits(3, "noise", np.arange(0), 9).shape == (0, 9)


def test_bad_positions_are_named():
    with pytest.raises(ValueError, match="positions must be >= 0, got -2 for stream 'noise'"):
        raw_bits(0, "noise", np.array([4, -2]), 1)
    with pytest.raises(ValueError, match="words must be >= 1, got 0 for stream 'noise'"):
        raw_bits(0, "noise", np.array([4]), 0)


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_extreme_bits_stay_inside_the_open_interval(bits, monkeypatch):
    monkeypatch.setattr(
        "megapromoe.diffusion.noise.raw_bits",
        lambda seed, purpose, positions, words: np.full((len(positions), words), bits, dtype=np.uint64),
    )
    (u,) = uniforms(0, "time", np.arange(1))
    assert 0.0 < u < 1.0
    z = normals(0, "noise", np.arange(1), (2,))
    assert np.isfinite(z).all() and np.abs(z).max() < 6.77


def kolmogorov_smirnov(sample, cdf):
    """Largest distance of the empirical distribution, times sqrt(n): above 1.95 once in a thousand."""
    values = np.sort(np.ravel(sample).astype(np.float64))
    steps = np.arange(len(values) + 1) / len(values)
    expected = cdf(values)
    return max(np.max(steps[1:] - expected), np.max(expected - steps[:-1])) * np.sqrt(len(values))


def test_uniforms_are_uniform():
    u = uniforms(2, "time", np.arange(200_000))
    assert u.min() > 0 and u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * len(u)))
    assert kolmogorov_smirnov(u, lambda x: x) < 1.95
    assert abs(correlation(u[1:], u[:-1])) < 5 / np.sqrt(len(u))


def test_normals_are_normal_in_every_place():
    z = normals(2, "noise", np.arange(20_000), (1, 3, 5))
    assert z.dtype == np.float32 and z.shape == (20_000, 1, 3, 5)
    assert kolmogorov_smirnov(z, lambda x: torch.special.ndtr(torch.from_numpy(x)).numpy()) < 1.95
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(len(z))
    assert np.abs(z.var(0) - 1).max() < 5 * np.sqrt(2 / len(z))
    assert (z**4).mean() == pytest.approx(3, abs=5 * np.sqrt(96 / z.size))
    # The two values of a Box-Muller pair are independent, and so are their squares.
    places = z.reshape(len(z), -1)
    between = np.corrcoef(np.concatenate([places, places**2], axis=1).T) - np.eye(30)
    assert np.abs(between).max() < 5 / np.sqrt(len(z))


def test_purposes_and_seeds_are_independent():
    positions = np.arange(100_000)
    streams = [uniforms(s, purpose, positions) for s in (0, 1, -1) for purpose in ("time", "flip", "label drop")]
    between = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(between).max() < 5 / np.sqrt(len(positions))


def test_permutation_is_a_uniform_order_of_all():
    orders = np.stack([permutation(0, "order", epoch, 5) for epoch in range(5000)])
    assert np.array_equal(np.sort(orders), np.tile(np.arange(5), (5000, 1)))
    share = (orders[:, :, None] == np.arange(5)).mean(0)
    assert np.abs(share - 0.2).max() < 5 * np.sqrt(0.16 / 5000)


# The stream


def test_a_batch_is_the_sum_of_its_parts():
    stream = stream_of()
    for first in (0, 15, 400):  # 15: across the end of an epoch
        full = in_stream_order(stream.batch(first, 8))
        assert full["positions_B"].tolist() == list(range(first, first + 8))
        assert_same(full, in_stream_order(stream.batch(first, 3), stream.batch(first + 3, 5)))
        assert_same(full, in_stream_order(stream_of().batch(first, 8)))  # no state between calls


def test_seed_changes_everything_but_the_data():
    a, b = (in_stream_order(stream_of(seed=seed).batch(0, 20)) for seed in (1, 2))
    assert not torch.equal(a["labels_B"], b["labels_B"])
    assert (a["noise_BCHW"] != b["noise_BCHW"]).all() and (a["u_B"] != b["u_B"]).all()


def test_each_epoch_visits_every_record_once_in_a_different_order():
    stream = stream_of(size=20)
    epochs = [stream.indices(np.arange(20 * e, 20 * e + 20)).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batch_holds_the_record_of_its_position_with_flip_and_null_label():
    stream = stream_of(size=50)
    batch = in_stream_order(stream.batch(60, 40))
    clean, labels = stream.dataset.read(stream.indices(np.arange(60, 100)))
    flipped = 0
    for row in range(40):
        plain, mirrored = torch.from_numpy(clean[row]), torch.from_numpy(clean[row][..., ::-1].copy())
        assert torch.equal(batch["clean_BCHW"][row], plain) or torch.equal(batch["clean_BCHW"][row], mirrored)
        flipped += torch.equal(batch["clean_BCHW"][row], mirrored)
        assert batch["labels_B"][row] in (labels[row], NULL)
    assert 8 < flipped < 32
    unflipped = in_stream_order(stream_of(size=50, flip=False).batch(60, 40))
    assert torch.equal(unflipped["clean_BCHW"], torch.from_numpy(clean))
    assert torch.equal(unflipped["noise_BCHW"], batch["noise_BCHW"])


def test_flip_condition_dropout_and_time_are_independent():
    count = 4000
    mirrored, plain = (
        in_stream_order(stream_of(size=count, condition_dropout=0.5, flip=flip).batch(0, count))
        for flip in (True, False)
    )
    was_flipped = (mirrored["clean_BCHW"] != plain["clean_BCHW"]).flatten(1).any(1)
    columns = torch.stack([was_flipped.double(), (plain["labels_B"] == NULL).double(), plain["u_B"].double()])
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 5 / np.sqrt(count)


@pytest.mark.parametrize("condition_dropout", [0.0, 0.3, 1.0])
def test_conditional_samples_come_first_and_are_counted(condition_dropout):
    stream = stream_of(condition_dropout=condition_dropout, size=1000)
    batch = stream.batch(0, 1000)
    is_null = batch.labels_B == NULL
    assert not is_null[: batch.num_conditional].any() and is_null[batch.num_conditional :].all()
    assert 1000 - batch.num_conditional == pytest.approx(1000 * condition_dropout, abs=5 * np.sqrt(250))
    if condition_dropout in (0.0, 1.0):
        assert batch.num_conditional == 1000 * (1 - condition_dropout)
    for part in (batch.positions_B[: batch.num_conditional], batch.positions_B[batch.num_conditional :]):
        assert (part.diff() > 0).all()


def test_batch_has_the_types_the_trainer_relies_on():
    batch = stream_of().batch(0, 6)
    floats = (batch.clean_BCHW, batch.noise_BCHW, batch.u_B)
    assert {t.dtype for t in floats} == {torch.float32}
    assert {t.dtype for t in (batch.labels_B, batch.positions_B)} == {torch.int64}
    assert isinstance(batch.num_conditional, int) and len(batch) == 6
    assert ((batch.u_B > 0) & (batch.u_B < 1)).all()
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.num_conditional == batch.num_conditional
    assert moved.clean_BCHW.device.type == moved.positions_B.device.type == "meta"


def test_a_time_draw_stays_below_one_in_float32(monkeypatch):
    monkeypatch.setattr("megapromoe.data.sample_stream.uniforms", lambda *_: np.full(4, 1 - 2.0**-53))
    assert (stream_of().batch(0, 4).u_B < 1).all()


def test_bad_index_ranges_are_refused():
    with pytest.raises(ValueError, match="first -1, count 2"):
        stream_of().batch(-1, 2)
    with pytest.raises(ValueError, match="first 0, count 0"):
        stream_of().batch(0, 0)


# Micro-batches


def test_every_layout_takes_the_same_global_batch():
    for ranks, accumulation in [(1, 1), (2, 1), (4, 2), (1, 4)]:
        taken = [SampleStream.micro_batches(3, ranks, rank, accumulation, 16) for rank in range(ranks)]
        assert all(len(ranges) == accumulation for ranges in taken)
        # Part by part, and rank by rank inside of a part, positions come in stream order.
        in_order = [p for a in range(accumulation) for ranges in taken for p in ranges[a]]
        assert in_order == list(range(48, 64))


def test_micro_batches_refuse_what_does_not_divide():
    with pytest.raises(ValueError, match="train.global_batch: 16 is not a multiple of 3 .* x 2 .* = 6"):
        SampleStream.micro_batches(0, 3, 0, 2, 16)
    with pytest.raises(ValueError, match="rank 4 is not in 0..3"):
        SampleStream.micro_batches(0, 4, 4, 1, 16)


# Prefetching


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_prefetch_gives_the_batches_in_order_and_ends():
    stream = stream_of()
    ranges = [range(0, 4), range(10, 12), range(4, 10)]
    batches = list(prefetch(stream, iter(ranges)))
    assert len(batches) == 3
    for batch, stretch in zip(batches, ranges, strict=True):
        assert_same(in_stream_order(batch), in_stream_order(stream.batch(stretch.start, len(stretch))))
    assert list(prefetch(stream, [])) == []
    assert not loader_threads()


def test_prefetch_prepares_one_batch_ahead_in_one_thread_and_closes():
    made = []

    class Recorder:
        def batch(self, first, count):
            made.append((first, threading.current_thread().name))
            return first

    batches = prefetch(Recorder(), (range(i, i + 1) for i in range(10**9)))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert not loader_threads()
    assert [first for first, _ in made] in ([0, 1, 2], [0, 1, 2, 3])
    assert {name for _, name in made} == {"loader_0"}


def test_prefetch_raises_in_the_turn_of_the_broken_batch():
    class Broken:
        def batch(self, first, count):
            if first == 1:
                raise OSError("record 1 cannot be read")
            return first

    batches = prefetch(Broken(), [range(0, 1), range(1, 2), range(2, 3)])
    assert next(batches) == 0
    with pytest.raises(OSError, match="record 1 cannot be read"):
        next(batches)
    assert not loader_threads()


def test_several_threads_keep_the_order_and_make_as_many_batches_ahead():
    made, threads = [], set()

    class Uneven:
        def batch(self, first, count):
            time.sleep(0.03 if first % 3 == 0 else 0.001)  # the first of three is the last to be ready
            made.append(first)
            threads.add(threading.current_thread().name)
            return first

    batches = prefetch(Uneven(), (range(i, i + 1) for i in range(10**9)), workers=3)
    assert [next(batches) for _ in range(9)] == list(range(9)) != made[:9]
    time.sleep(0.1)
    assert sorted(made) == list(range(12)) and len(threads) == 3
    batches.close()
    assert not loader_threads()


def test_many_threads_give_the_stream_of_one_thread():
    ranges = [range(i, i + 5) for i in range(0, 60, 5)]
    single, four = (list(prefetch(stream_of(), ranges, workers)) for workers in (1, 4))
    assert_same(in_stream_order(*single), in_stream_order(*four))
    assert [batch.positions_B.tolist() for batch in single] == [batch.positions_B.tolist() for batch in four]


# Data sets


def config(source="synthetic", **model):
    fields = dict(in_channels=1, input_size=8, num_classes=10) | model
    return SimpleNamespace(
        model=SimpleNamespace(**fields, has_text=False),
        data=SimpleNamespace(source=source, size=64, condition_dropout=0.1, seed=3),
    )


def test_digits_are_the_real_ones():
    digits = open_dataset(config("digits"))
    assert len(digits) == 1797 and digits.shape == (1, 8, 8) and digits.class_names[7] == "7"
    images, labels = digits.read(np.arange(1797))
    assert images.dtype == np.float32 and labels.dtype == np.int64 and images.shape == (1797, 1, 8, 8)
    assert images.min() == -1 and images.max() == 1 and set(labels) == set(range(10))
    # Writing a 0 leaves the middle empty; writing a 1 fills it.
    assert images[labels == 0][:, 0, 3:5, 3:5].mean() < -0.5 < 0.2 < images[labels == 1][:, 0, 3:5, 3:5].mean()


def test_synthetic_latents_scatter_around_their_class():
    data = open_dataset(config(in_channels=3, input_size=4, num_classes=4))
    data = Synthetic(data.shape, 4, 4000, seed=3)
    latents, labels = data.read(np.arange(4000))
    assert np.bincount(labels).tolist() == [1000] * 4
    for label in range(4):
        spread = latents[labels == label] - data.means[label]
        assert np.abs(spread.mean(0)).max() < 5 / np.sqrt(1000)
        assert spread.std() == pytest.approx(1, abs=0.02)
    again, _ = data.read(np.array([77, 5]))
    assert np.array_equal(again, latents[[77, 5]])
    other, _ = Synthetic(data.shape, 4, 4000, seed=4).read(np.array([77, 5]))
    assert (other != again).all()


def test_all_mismatches_of_a_data_set_are_reported_at_once():
    with pytest.raises(DatasetError) as error:
        open_dataset(config("digits", in_channels=4, input_size=32, num_classes=1000))
    for part in (
        "(1, 8, 8)",
        "(4, 32, 32)",
        "model.in_channels=1",
        "model.input_size=8",
        "model.num_classes=10",
    ):
        assert part in str(error.value)
    with pytest.raises(DatasetError, match="data.source: 'imagenet' is not known"):
        open_dataset(config("imagenet"))


def write_fashion(folder, count=6, side=28, zipped=True):
    """Files as Fashion-MNIST's, of `count` random images; returns these and their labels."""
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, side, side), dtype=np.uint8)
    labels = random.integers(0, 10, count, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            data = header + array.tobytes()
            path = folder / f"{prefix}-{name}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_read_and_framed(zipped, tmp_path):
    images, labels = write_fashion(tmp_path, zipped=zipped)
    data = FashionMNIST("test", tmp_path)
    images_read, classes = data.read(np.array([4, 1]))
    assert images_read.dtype == np.float32 and images_read.shape == (2, 1, 32, 32) and len(data) == 6
    assert np.allclose(images_read[:, 0, 2:30, 2:30], images[[4, 1]] / 127.5 - 1, atol=1e-6)
    assert (images_read[:, 0, :2] == -1).all() and (images_read[:, 0, :, 30:] == -1).all()
    assert classes.tolist() == labels[[4, 1]].tolist()
    mirrored = data.sample(np.array([4, 1]), np.array([True, False]), None)
    assert np.array_equal(mirrored[0], images_read[0, ..., ::-1]) and np.array_equal(mirrored[1], images_read[1])


def test_fashion_mnist_files_that_are_wrong_are_named(tmp_path):
    with pytest.raises(DatasetError, match="holds no train-images-idx3-ubyte.gz; .*apt-get install dataset-fashion"):
        FashionMNIST("train", tmp_path)
    write_fashion(tmp_path, side=27)
    with pytest.raises(DatasetError, match=r"images of \(27, 27\)"):
        FashionMNIST("train", tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    full = path.read_bytes()
    path.write_bytes(full[:-100])
    with pytest.raises(DatasetError, match="train-images-idx3-ubyte.gz cannot be read: .*; download it again"):
        FashionMNIST("train", tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(full)[:-1]))
    with pytest.raises(DatasetError, match="is not an idx file of bytes in 3 dimensions"):
        FashionMNIST("train", tmp_path)


@pytest.mark.skipif(not Path(FOLDER).is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_package():
    config = resolve("fashion")
    train, test = (open_dataset(config, split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [6000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    boots, _ = train.read(np.flatnonzero(train.labels == 9))
    trousers, _ = train.read(np.flatnonzero(train.labels == 1))
    assert train.class_names[9] == "ankle boot" and (boots.mean((0, 1, 2))[[3, 28]] > -0.9).all()  # wide
    assert trousers.mean((0, 1, 2))[[3, 28]].max() < -0.95 < trousers.mean((0, 1, 2))[15]  # narrow


def test_sources_without_a_test_split_are_refused():
    for source in ("digits", "synthetic"):
        with pytest.raises(DatasetError, match=f"'{source}' has no test split"):
            open_dataset(config(source), "test")
    with pytest.raises(DatasetError, match="split 'validation': must be one of train, test"):
        open_dataset(config("digits"), "validation")


def test_a_label_out_of_range_is_named_with_its_record():
    digits = Digits()
    digits.labels[[40, 90]] = [10, -1]
    with pytest.raises(DatasetError, match=r"record 40 has label 10, labels must be in 0\.\.9 \(2 of 1797"):
        check_dataset(digits, config().model)
    digits.labels = digits.labels[:30]
    with pytest.raises(DatasetError, match="30 labels for 1797 records"):
        check_dataset(digits, config().model)
    with pytest.raises(DatasetError, match="no records"):
        check_dataset(Synthetic((1, 8, 8), 10, 0, seed=0), config().model)
