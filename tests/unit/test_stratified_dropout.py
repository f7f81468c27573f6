"""Stratified dropout of conditions: exact numbers at every layout, equal probabilities, dependence in a stratum."""

from itertools import combinations

import numpy as np
import pytest
import torch

from megapromoe.checkpoint.origin import changed_settings, fixed_changes
from megapromoe.config.options import ConfigError, to_dict
from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Synthetic
from megapromoe.data.sample_stream import SampleStream

NULL = 10


def stream_of(rate: float, stratum: int, seed: int = 1) -> SampleStream:
    data = Synthetic((1, 1, 1), NULL, 20, seed=5)
    return SampleStream(data, seed, rate, False, NULL, dropout_stratum=stratum)


def dropped_of(stream: SampleStream, first: int, count: int) -> np.ndarray:
    """Whether each of these positions is null, in the order of the stream."""
    batch = stream.batch(first, count)
    return (batch.labels_B == NULL).numpy()[batch.positions_B.argsort().numpy()]


@pytest.mark.parametrize("rate, stratum", [(0.25, 8), (0.1, 10), (1 / 3, 3), (0.75, 4), (0.0, 5), (29 / 30, 30)])
def test_each_stratum_drops_the_same_number(rate, stratum):
    dropped = dropped_of(stream_of(rate, stratum), 0, 40 * stratum).reshape(40, stratum)
    assert (dropped.sum(1) == round(rate * stratum)).all()
    assert len({tuple(row) for row in dropped.tolist()}) > (1 if rate > 0 else 0)


def test_a_position_is_dropped_whatever_the_batch_that_has_it():
    """Also for batches that begin and end within a stratum, and far into the stream."""
    stream = stream_of(0.25, 8)
    for begin in (0, 8 * 10**12):
        complete = dropped_of(stream, begin, 64)
        for first, count in ((0, 1), (3, 2), (5, 8), (7, 30), (8, 8), (63, 1), (1, 63)):
            assert np.array_equal(dropped_of(stream, begin + first, count), complete[first : first + count])


def test_every_layout_drops_the_same_samples_and_has_equal_micro_batches():
    """Each micro-batch of each rank has a quarter of null images; independent dropout gives other numbers."""
    global_batch, steps = 64, 4
    expected = dropped_of(stream_of(0.25, 8), 0, steps * global_batch)
    for ranks, accumulation in ((1, 1), (2, 1), (8, 1), (2, 2), (1, 8), (4, 2)):
        size = global_batch // (ranks * accumulation)
        stream, dropped, numbers, independent = stream_of(0.25, 8), np.zeros_like(expected), set(), set()
        for step in range(steps):
            for rank in range(ranks):
                for part in SampleStream.micro_batches(step, ranks, rank, accumulation, global_batch):
                    dropped[part.start : part.stop] = dropped_of(stream, part.start, len(part))
                    numbers.add(stream.batch(part.start, len(part)).num_conditional)
                    independent.add(stream_of(0.25, 0).batch(part.start, len(part)).num_conditional)
        assert np.array_equal(dropped, expected) and numbers == {size * 3 // 4} and len(independent) > 1


@pytest.mark.full
def test_all_choices_of_a_stratum_are_equally_probable_and_strata_are_independent():
    """The marginal rate of every position is exact; two positions of a stratum have covariance -p(1-p)/(n-1)."""
    strata, n, k = 12_000, 4, 2
    p = k / n
    dropped = dropped_of(stream_of(p, n), 0, strata * n).reshape(strata, n)
    choices = [tuple(i in choice for i in range(n)) for choice in combinations(range(n), k)]
    counts = np.array([(dropped == choice).all(1).sum() for choice in choices])
    assert counts.sum() == strata
    expected = strata / len(choices)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # χ² of 5 degrees: once in a thousand
    assert np.abs(dropped.mean(0) - p).max() < 5 * np.sqrt(p * (1 - p) / strata)
    covariance = np.cov(dropped.T.astype(float))
    within = np.full((n, n), -p * (1 - p) / (n - 1))
    np.fill_diagonal(within, p * (1 - p))
    assert np.abs(covariance - within).max() < 5 * 0.25 / np.sqrt(strata)
    between = np.cov(dropped[1:].T.astype(float), dropped[:-1].T.astype(float))[:n, n:]
    assert np.abs(between).max() < 5 * 0.25 / np.sqrt(strata)


def test_the_seed_decides_and_nothing_else_changes():
    """Order, images, noise and times are those of independent dropout."""
    assert not np.array_equal(dropped_of(stream_of(0.25, 8), 0, 80), dropped_of(stream_of(0.25, 8, seed=2), 0, 80))
    stratified, independent = (stream_of(0.25, stratum).batch(0, 80) for stratum in (8, 0))
    orders = [batch.positions_B.argsort() for batch in (stratified, independent)]
    for name in ("clean_BCHW", "noise_BCHW", "u_B"):
        a, b = (getattr(batch, name)[order] for batch, order in zip((stratified, independent), orders, strict=True))
        assert torch.equal(a, b)


def test_dropped_positions_never_change():
    """A run is repeated by its seed: these positions are part of the format."""
    assert np.flatnonzero(dropped_of(stream_of(0.25, 0), 0, 80)).tolist() == [
        *(21, 27, 43, 46, 47, 52, 53, 54, 61, 64, 65, 73, 76, 79)
    ]
    assert np.flatnonzero(dropped_of(stream_of(0.25, 8), 0, 40)).tolist() == [0, 1, 9, 13, 18, 21, 25, 27, 33, 37]


# ---- options


def violations(*overrides: str, world: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=overrides, world=world)
    return list(error.value.violations)


STRATUM = "data.condition_dropout_stratum="


@pytest.mark.parametrize(
    "rate, stratum, remedies",
    [
        (0.1, 8, ["data.condition_dropout=0.0", "data.condition_dropout=0.125", f"{STRATUM}0"]),
        (0.95, 4, ["data.condition_dropout=0.75", f"{STRATUM}0"]),
        (0.333, 3, ["data.condition_dropout=0.0", "data.condition_dropout=0.3333333333333333"]),
        (0.1, 1, ["data.condition_dropout=0.0"]),
    ],
)
def test_a_rate_that_is_no_whole_number_of_a_stratum_is_refused_with_remedies_that_work(rate, stratum, remedies):
    given = [f"data.condition_dropout={rate}", f"{STRATUM}{stratum}"]
    (violation,) = violations(*given)
    numbers = " or ".join(remedy.split("=")[1] for remedy in remedies if STRATUM not in remedy)
    assert violation == (
        f"data.condition_dropout_stratum = {stratum}: times data.condition_dropout = {rate} must be a whole number,"
        f" the labels dropped of each {stratum} samples; set data.condition_dropout to {numbers},"
        " or data.condition_dropout_stratum to 0"
    )
    for remedy in remedies:
        resolve("digits", overrides=[*given, remedy])


@pytest.mark.parametrize(
    "overrides, remedy, followed",
    [
        (
            ["data.condition_dropout=0.25", f"{STRATUM}16", "train.global_batch=32"],
            "must divide the micro-batch of a rank, 8 images; use 4 or 8, or 0 for independent dropout",
            [[f"{STRATUM}4"], [f"{STRATUM}8"], [f"{STRATUM}0"]],
        ),
        (
            ["data.condition_dropout=0.1", f"{STRATUM}10", "train.global_batch=96", "train.accumulation=2"],
            "must divide the micro-batch of a rank, 12 images; use 12 with data.condition_dropout=0.08333333333333333,"
            " or 0 for independent dropout",
            [[f"{STRATUM}12", "data.condition_dropout=0.08333333333333333"], [f"{STRATUM}0"]],
        ),
        (
            ["data.condition_dropout=0.5", f"{STRATUM}2", "train.global_batch=4"],
            "must divide the micro-batch of a rank, 1 images; use 0 for independent dropout, or a larger"
            " train.global_batch",
            [[f"{STRATUM}0"], ["train.global_batch=8"]],
        ),
    ],
)
def test_strata_must_divide_the_micro_batch(overrides, remedy, followed):
    resolve("digits", overrides=overrides)
    (violation,) = violations(*overrides, world=4)
    assert violation.endswith(remedy)
    for changes in followed:
        resolve("digits", overrides=[*overrides, *changes], world=4)


def test_a_run_keeps_its_strata():
    """Runs written before the option have independent dropout."""
    config = resolve("digits", overrides=["data.condition_dropout=0.125", f"{STRATUM}8"])
    stored = to_dict(resolve("digits", overrides=["data.condition_dropout=0.125"]))
    del stored["data"]["condition_dropout_stratum"]
    assert fixed_changes(changed_settings(stored, config)) == ["data.condition_dropout_stratum"]
