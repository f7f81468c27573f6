"""The joint law of active parameters, experts and images: synthetic data with known constants, and what is refused."""

import itertools

import numpy as np
import pytest
from support.small_studies import recipe

from megapromoe.studies.fit import FitError
from megapromoe.studies.joint_law import fit_joint_law
from megapromoe.studies.joint_law_tables import joint_law_sections

N, E, D = (1e6, 4e6, 1.6e7), (4, 8, 16, 64), (1e5, 4e5, 3.2e6)


def truth(n, e, d):
    """0.3 + 40 N^-0.4 + 0.2 E^-0.6 + 9 D^-0.35"""
    return 0.3 + 40 * n**-0.4 + 0.2 * e**-0.6 + 9 * d**-0.35


def grid(points, seeds=3, rest=0.0, shift=0.0, seed=0, law=truth):
    generator = np.random.default_rng(seed)
    shifts = shift * generator.standard_normal(seeds)
    runs = [(*point, s) for point in points for s in range(seeds)]
    n, e, d, s = (np.array(column) for column in zip(*runs, strict=True))
    loss = law(n, e, d) + shifts[s] + rest * generator.standard_normal(len(runs))
    return {"active_parameters": n, "experts": e, "images": d}, loss, s


def test_known_constants_are_recovered_without_noise():
    points = list(itertools.product(N, E, D))
    exact = fit_joint_law(*grid(points), replicates=2)
    constants = [exact.constant, *(x for t in exact.terms.values() for x in (t.coefficient, t.exponent))]
    assert constants == pytest.approx([0.3, 40, 0.4, 0.2, 0.6, 9, 0.35], rel=1e-3) and exact.arms == 36
    x = {"active_parameters": np.array([2e6]), "experts": np.array([32]), "images": np.array([1e6])}
    assert exact.at(x)[0] == pytest.approx(truth(2e6, 32, 1e6), rel=1e-5)


@pytest.mark.full
def test_intervals_contain_known_constants():
    """Six studies with noise of 0.001, and 0.002 of the seed in all runs; more noise, wider intervals."""
    points = list(itertools.product(N, E, D))
    known = {"active_parameters": (40, 0.4, N), "experts": (0.2, 0.6, E), "images": (9, 0.35, D)}
    held, supported = [], 0
    for seed in range(6):
        law = fit_joint_law(*grid(points, rest=0.001, shift=0.002, seed=seed), replicates=40, seed=seed)
        supported += not law.fit_warnings
        held.append([law.constant_interval[0] < 0.3 < law.constant_interval[1]])
        for name, (coefficient, exponent, values) in known.items():
            term, gain = law.terms[name], coefficient * (values[0] ** -exponent - values[-1] ** -exponent)
            assert term.exponent == pytest.approx(exponent, abs=0.1) and term.gain == pytest.approx(gain, rel=0.05)
            held[-1] += [term.interval[0] < exponent < term.interval[1]]
            held[-1] += [term.gain_interval[0] < gain < term.gain_interval[1]]
    assert np.mean(held) >= 0.85 and np.mean(held, axis=0).min() >= 0.6 and supported >= 4
    noisier = fit_joint_law(*grid(points, rest=0.004, shift=0.002, seed=5), replicates=40)
    assert np.ptp(noisier.terms["images"].interval) > 2 * np.ptp(law.terms["images"].interval)


@pytest.mark.full
def test_laws_that_the_data_contradict_are_not_supported():
    points = list(itertools.product(N, E, D))

    def rising(n, e, d):
        return truth(n, 8, d) + 0.002 * np.log2(e)

    assert "does not fall with experts" in str(fit_joint_law(*grid(points, rest=0.001, law=rising), 20).fit_warnings)

    def interacting(n, e, d):
        return truth(n, e, d) + 2000 * n**-0.6 * e**-0.5

    assert "off the law" in str(fit_joint_law(*grid(points, rest=0.0005, law=interacting), 20).fit_warnings)


def test_a_variable_that_does_not_vary_is_part_of_the_constant():
    law = fit_joint_law(*grid(list(itertools.product((1e6, 1.01e6), E, D)), rest=1e-4), replicates=20)
    assert list(law.terms) == ["experts", "images"] and law.arms == 24
    assert law.constant == pytest.approx(0.3 + 40 * 1e6**-0.4, abs=0.02)


@pytest.mark.parametrize(
    "points, seeds, reason",
    [
        ([(n, 8, 1e5) for n in N], 3, "nothing but active parameters varies; a joint law needs two of"),
        (
            itertools.product(N, (4, 8), D),
            3,
            "experts: 2 values, 4 and 8; the term needs 3: add values to the axis model.num",
        ),
        (itertools.product(N, (8, 10, 12), D), 3, "experts: 8 to 12; the term needs a factor of 2: add values to"),
        ([(n, e, 4e11 / n) for n in N for e in E], 3, r"vary together \(correlation -1.00\), as at one compute budget"),
        (itertools.product(N, (8,), D), 1, "one run for each point"),
        ([(N[0], 4, D[0]), (N[1], 16, D[0]), (N[2], 4, D[1]), (N[0], 8, D[2])], 2, "4 points for 7 constants"),
    ],
)
def test_grids_that_cannot_identify_the_law_are_refused(points, seeds, reason):
    with pytest.raises(FitError, match=reason):
        fit_joint_law(*grid(list(points), seeds), replicates=2)


def test_the_report_has_the_law_of_each_router():
    made = recipe(variants={"promoe": {}, "dense": {"settings": {"model.router": "dense"}}}, axes={})
    x, loss, seeds = grid(list(itertools.product((2e6,), E, D)), rest=1e-4)
    rows = [
        {"variant": name, "seed": int(s), "fixed_loss": value, "active_parameters": n, "images": d}
        | {"experts": int(e) if name == "promoe" else None}
        for name in ("promoe", "dense")
        for n, e, d, s, value in zip(*x.values(), seeds, loss, strict=True)
    ]
    text = "\n".join(joint_law_sections(rows, made))
    assert "dense" not in text, "it varies in its images alone"
    assert "| promoe | 12 | " in text and " D^-0.3" in text and "| yes |" in text
    few = [row for row in rows if row["experts"] in (4, 8)]
    assert "None for promoe: experts: 2 values, 4 and 8" in "\n".join(joint_law_sections(few, made))
    assert not list(joint_law_sections(rows[-36:], made))
