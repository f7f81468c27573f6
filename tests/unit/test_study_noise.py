"""The noise floor of a study: deviations of single runs and of pairs, against hand calculation and simulation."""

import csv
import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from support.small_studies import compared, finished, recipe, rows

from megapromoe.cli import main
from megapromoe.studies.noise import noise_floor, noise_floors, sentence

DOCS = Path(__file__).parents[2] / "docs"


def grid(shift_S, rest_AS, means=None):
    """arm -> seed -> value."""
    means = range(len(rest_AS)) if means is None else means
    return {
        arm: {s: mean + shift_S[s] + rest for s, rest in enumerate(rests)}
        for arm, (mean, rests) in enumerate(zip(means, rest_AS, strict=True))
    }


def test_two_models_by_hand():
    """(1, 2, 4) and (2, 2, 5): squares 14/3 + 6 with 4 degrees of freedom; differences 1, 0, 1 with variance 1/3."""
    floor = noise_floor("loss", {"a": dict(enumerate([1.0, 2.0, 4.0])), "b": dict(enumerate([2.0, 2.0, 5.0]))})
    assert (floor.arms, floor.runs) == (2, 6)
    assert floor.single.value == pytest.approx(math.sqrt((14 / 3 + 6) / 4))
    assert floor.unpaired.value == pytest.approx(math.sqrt(16 / 3)) and floor.pair.value == pytest.approx(3**-0.5)
    assert floor.ratio == pytest.approx(0.25) and floor.pair.freedom == 2
    # Mean squares 31/6 of the seeds and 1/6 of the rest, two degrees each: Satterthwaite's (sum)^2 / (sum of squares).
    assert floor.single.freedom == pytest.approx((32 / 6) ** 2 / ((31 / 6) ** 2 + (1 / 6) ** 2) * 2)
    # chi-square quantiles of two degrees of freedom are -2 log(1 - p); Student's t(0.975, 2) is 4.3027.
    low, high = floor.pair.interval
    assert low == pytest.approx(3**-0.5 * math.sqrt(2 / (-2 * math.log(0.025))))
    assert high == pytest.approx(3**-0.5 * math.sqrt(2 / (-2 * math.log(0.975))))
    assert floor.pair.limit == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)


def test_the_pooled_variance_of_pairs_is_the_mean_over_all_pairs():
    """Of the published figures of docs/quality.csv: eleven models, three seeds."""
    lines = list(csv.DictReader((DOCS / "quality.csv").read_text(encoding="utf-8").splitlines()))
    distance = next(name for name in lines[0] if name.startswith("evaluated: Fréchet distance"))
    for metric in ("fixed_loss", distance):
        values = {}
        for line in lines:
            values.setdefault(line["variant"], {})[int(line["seed"])] = float(line[metric])
        floor = noise_floor(metric, values)
        single = [statistics.variance(seeds.values()) for seeds in values.values()]
        pairs = [
            statistics.variance([a[seed] - b[seed] for seed in a])
            for a, b in itertools.combinations(values.values(), 2)
        ]
        assert len(pairs) == 55 and floor.pair.freedom == 20
        assert floor.single.value == pytest.approx(math.sqrt(statistics.fmean(single)), rel=1e-9)
        assert floor.pair.value == pytest.approx(math.sqrt(statistics.fmean(pairs)), rel=1e-9)


def test_runs_that_are_missing():
    rest = np.random.default_rng(0).standard_normal((3, 4))
    values = grid([0.0, 5.0, -3.0, 8.0], rest)
    del values[0][3], values[1][0]
    floor = noise_floor("loss", values)
    assert floor.runs == 10 and floor.pair.freedom == 10 - (3 + 4 - 1), "runs minus arms and seeds plus one"
    assert floor.pair.value < 3 < 5 < floor.unpaired.value, "the shifts of seeds cancel in pairs alone"
    alone = noise_floor("loss", {"a": {0: 1.0, 1: 3.0}, "b": {0: 2.0}})
    assert alone.pair is None and alone.ratio is None and alone.single.value == pytest.approx(math.sqrt(2))
    assert alone.arms == 1 and "needs two models with two common seeds" in sentence(alone)
    assert noise_floor("loss", {"a": {0: 1.0}, "b": {0: 2.0}}) is None
    equal = noise_floor("loss", {"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}})
    assert equal.single.value == 0 and equal.ratio is None and equal.pair.value == 0


def test_intervals_and_limits_keep_their_level_in_simulation():
    """Six arms, four seeds, deviations 2 of the seed and 1 of the rest: 500 studies, each with a new pair of runs.

    The 500 have a standard error of 1 % around 95 %. With 18 degrees of freedom, as if arms were independent, the
    interval of single runs would hold in about 65 %.
    """
    generator = np.random.default_rng(1)
    truth, held, exceeded = {"single": math.sqrt(5), "pair": math.sqrt(2)}, [], []
    for _ in range(500):
        floor = noise_floor("loss", grid(2 * generator.standard_normal(4), generator.standard_normal((6, 4))))
        intervals = {name: getattr(floor, name).interval for name in truth}
        held.append([intervals[name][0] <= value <= intervals[name][1] for name, value in truth.items()])
        single = truth["single"] * math.sqrt(2) * generator.standard_normal()
        pair = truth["pair"] * generator.standard_normal()
        exceeded.append([abs(single) > floor.unpaired.limit, abs(pair) > floor.pair.limit])
    assert np.mean(held, axis=0).min() >= 0.92 and np.mean(held, axis=0).max() <= 0.985
    assert np.mean(exceeded, axis=0).min() >= 0.02 and np.mean(exceeded, axis=0).max() <= 0.08


def test_the_report_begins_with_the_noise_floor(tmp_path, capsys):
    """Seeds 10 apart, pairs 0.02 apart: one degree of freedom for pairs of two models, t(0.975, 1) = 12.706."""
    study = finished(tmp_path, compared(), lambda t: 10.0 * t.seed + 0.02 * t.seed * (t.variant == "tc"))
    assert main(["study", "collect", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text.index("## Noise floor") < text.index("## Models") < text.index("| model |")
    (loss, *others) = csv.DictReader((tmp_path / "noise.csv").read_text().splitlines())
    assert loss["metric"] == "fixed_loss" and loss["arms"] == "5" and loss["runs"] == "10"
    # Arms 0, 0, 0, 0.02, 0.02 (a fifth of the squares of ten pairs): 10 pairs, of which 6 differ, by 0.02 per seed.
    expected = math.sqrt(6 * (0.02**2 / 2) / 10)
    assert float(loss["paired_difference"]) == pytest.approx(expected, rel=1e-6)
    assert float(loss["unpaired_difference"]) == pytest.approx(math.sqrt(2 * (3 * 50 + 2 * 10.02**2 / 2) / 5), rel=1e-6)
    (floor, training) = noise_floors(rows(study), study.recipe)
    assert sentence(floor) in text and "training" in training.metric and others[0]["metric"] == "training_loss"
    limit = 2.77645 * expected  # t(0.975, 4); 0.0304
    assert float(loss["paired_limit"]) == pytest.approx(limit, rel=1e-5)
    assert "pairs on one seed differ by more than 0.030." in text
    capsys.readouterr()


def test_one_seed_has_no_noise_floor(tmp_path, capsys):
    finished(tmp_path, recipe(seeds=[0]))
    assert main(["study", "collect", str(tmp_path)]) == 0
    assert "noise.csv: not written: no model has two seeds that are done; add seeds" in capsys.readouterr().out
    assert "Noise floor" not in (tmp_path / "results.md").read_text()
