"""How many seeds resolve a difference: against published tables, simulation, and another study's noise."""

import math

import numpy as np
import pytest
from support.small_studies import compared, finished

from megapromoe.cli import main
from megapromoe.studies.noise import noise_floor
from megapromoe.studies.power import MOST, find_floor, power_of, power_sections, resolved_effect, seeds_for
from megapromoe.studies.recipe import StudyError


@pytest.mark.parametrize(
    "effect, paired, seeds",
    [
        # Cohen (1988), table 2.4.1, two-sided 5 %, power 0.80: n of each of two groups.
        (0.2, False, 394),
        (0.5, False, 64),
        (0.8, False, 26),
        (1.0, False, 17),
        # G*Power 3 (and R's power.t.test(type = "paired")), two-sided 5 %, power 0.80: number of pairs.
        (0.2, True, 199),
        (0.5, True, 34),
        (0.8, True, 15),
        (1.0, True, 10),
    ],
)
def test_seeds_are_those_of_published_tables(effect, paired, seeds):
    """Cohen's table has 393 for 0.2, by his approximation; the noncentral t gives 393.4, so 394."""
    assert seeds_for(effect, paired) == seeds
    assert power_of(effect, seeds, paired) >= 0.8 > power_of(effect, seeds - 1, paired)


def test_resolved_effects_invert_the_power_and_ninety_percent_needs_more():
    for paired in (True, False):
        effects = [resolved_effect(seeds, paired) for seeds in range(2, 21)]
        assert all(a > b for a, b in zip(effects, effects[1:], strict=False))
        for seeds, effect in zip((2, 5, 20), (effects[0], effects[3], effects[18]), strict=True):
            assert power_of(effect, seeds, paired) == pytest.approx(0.8, abs=1e-6)
            assert seeds_for(effect * 1.0001, paired) == seeds
    assert seeds_for(0.5, False, power=0.9) == 86 and seeds_for(1.0, True, power=0.9) == 13, "G*Power"
    assert power_of(0.0, 7, True) == pytest.approx(0.05), "no effect: the level of the test"
    assert seeds_for(1e-4, True) is None and seeds_for(100.0, True) == 2


@pytest.mark.parametrize("seeds, effect", [(3, 2.0), (5, 1.5)])
def test_the_power_is_that_of_simulated_t_tests(seeds, effect):
    """20,000 studies: a standard error of 0.35 %. t(0.975) of 2, 4 and 8 degrees of freedom from a printed table."""
    t = {2: 4.3027, 4: 2.7764, 8: 2.3060}
    generator = np.random.default_rng(seeds)
    d_NS = effect + generator.standard_normal((20000, seeds))
    paired = np.abs(d_NS.mean(1)) > t[seeds - 1] * d_NS.std(1, ddof=1) / math.sqrt(seeds)
    assert power_of(effect, seeds, True) == pytest.approx(paired.mean(), abs=0.011)
    a_NS, b_NS = effect + generator.standard_normal((20000, seeds)), generator.standard_normal((20000, seeds))
    pooled = np.sqrt((a_NS.var(1, ddof=1) + b_NS.var(1, ddof=1)) / 2)
    unpaired = np.abs(a_NS.mean(1) - b_NS.mean(1)) > t[2 * seeds - 2] * pooled * math.sqrt(2 / seeds)
    assert power_of(effect, seeds, False) == pytest.approx(unpaired.mean(), abs=0.011)


def test_the_report_of_a_study(tmp_path, capsys):
    """Pairs of tc and dense differ by 0 and 0.02: the variance of pairs is 0.00012, see test_study_noise."""
    study = finished(tmp_path, compared(), lambda t: 10.0 * t.seed + 0.02 * t.seed * (t.variant == "tc"))
    assert main(["study", "power", str(tmp_path), "--difference", "0.0109545"]) == 0  # one deviation of a pair
    text = capsys.readouterr().out
    assert "is resolved by 10 pairs (" in text and f"more than {MOST:,} unpaired seeds" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines[2:]] == [str(n) for n in range(2, 21)]
    # Ten pairs resolve 0.9960 deviations (G*Power), of 0.01095.
    assert lines[10].startswith("| 10 | 0.011 (")
    assert main(["study", "power", str(tmp_path), "--metric", "loss"]) == 0, "the whole name, not a part of two"
    assert "# Power: loss" in capsys.readouterr().out
    assert main(["study", "power", str(tmp_path), "--metric", "fid"]) == 2
    assert "is none of them; the metrics with two seeds are: fixed_loss; training_loss" in capsys.readouterr().err
    for wrong in ("1", "0.05", "x"):
        with pytest.raises(SystemExit):
            main(["study", "power", str(tmp_path), "--power", wrong])
    for task in study.tasks[5:]:
        study.loss_file(task).unlink()
    assert main(["study", "power", str(tmp_path)]) == 1
    assert "no noise is known" in capsys.readouterr().err


def test_metrics_are_named_by_parts_and_unknown_pairs_are_left_out():
    floors = [noise_floor(name, {"a": {0: 1.0, 1: 3.0}}) for name in ("fixed_loss", "evaluated: D, guidance 1", "x D")]
    assert find_floor(floors, "guidance").metric == "evaluated: D, guidance 1"
    with pytest.raises(StudyError, match="is a part of 3 of them"):
        find_floor(floors, "d")
    text = "\n".join(power_sections(floors[0], 1.0))
    assert "unknown: no two models" in text and "| 2 | - | " in text and " pairs (" not in text
    # One degree of freedom: the deviation is sqrt(2) · [0.446, 31.9], by chi-square quantiles 5.024 and 0.00098.
    assert "1.4 (0.63 to 45)" in text
