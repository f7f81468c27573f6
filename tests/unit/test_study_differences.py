"""Paired differences: the picture, and what is said of many of them."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from support.small_studies import recipe

from megapromoe.studies import report
from megapromoe.studies.difference_plot import draw_differences
from megapromoe.studies.difference_tables import difference_rows
from megapromoe.studies.figure_tables import mean_sections
from megapromoe.studies.multiple_comparisons import adjusted, holm, warning
from megapromoe.studies.results import report_pictures
from megapromoe.studies.study import Study
from megapromoe.studies.tables import mean_of, to_markdown

DISTANCE = "evaluated: Fréchet distance (X), 200 images, guidance "


def made(names, seeds=3, **changes):
    return recipe(axes={}, seeds=list(range(seeds)), variants={name: {} for name in names}, baseline="dense", **changes)


def study_of(names, seeds=3):
    return Study(Path("/nowhere"), made(names, seeds), ())


def rows_of(values):
    """Rows with a loss, its hundredfold as a distance and itself as a training loss: variant -> values of the seeds."""
    unknown = dict.fromkeys(("experts", "load_entropy", "dead_share", "images_per_second", "memory_bytes"))
    known = dict.fromkeys(("parameters", "active_parameters", "training_flops"), 1) | {"split": "test"}
    return [
        {"task": f"{name}-seed{seed}", "variant": name, "seed": seed, **unknown, **known}
        | {"fixed_loss": loss, "training_loss": loss, f"{DISTANCE}1.5": 100 * loss}
        for name, losses in values.items()
        for seed, loss in enumerate(losses)
    ]


# Seeds shift all models by 0, 3, 6; the differences to dense are 0.5, 0.7, 0.9 and -0.2, -0.1, -0.6.
VALUES = {"dense": [1.0, 4.0, 7.0], "worse": [1.5, 4.7, 7.9], "better": [0.8, 3.9, 6.4]}


def test_the_main_picture_shows_each_pair_its_interval_and_the_noise():
    figure = draw_differences(study_of(VALUES), rows_of(VALUES))
    assert len(figure.axes) == 3 and "differences to dense" in figure._suptitle.get_text()
    loss, _, distance = figure.axes
    assert [text.get_text() for text in loss.get_yticklabels()] == ["better", "worse"], "sorted, best first"
    zero, dots_of_better, mark_of_better, *_ = loss.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert sorted(dots_of_better.get_xdata()) == pytest.approx([-0.6, -0.2, -0.1])
    assert list(mark_of_better.get_xdata()) == pytest.approx([-0.3])
    # Half an interval of three seeds: 4.3027 standard errors.
    (interval,) = loss.containers[0].lines[2]
    half = 4.30265 * statistics.stdev([-0.2, -0.1, -0.6]) / math.sqrt(3)
    assert interval.get_segments()[0][:, 0].tolist() == pytest.approx([-0.3 - half, -0.3 + half], rel=1e-4)
    # The pairs differ by (.5 .7 .9), (-.2 -.1 -.6) and (.7 .8 1.5); four degrees of freedom, t(0.975) = 2.7764.
    pairs = [statistics.variance(d) for d in ([0.5, 0.7, 0.9], [-0.2, -0.1, -0.6], [0.7, 0.8, 1.5])]
    limit = 2.77645 * math.sqrt(statistics.fmean(pairs))
    of_pair, of_mean = (patch.get_extents().transformed(loss.transData.inverted()) for patch in loss.patches[:2])
    assert (of_pair.x0, of_pair.x1) == pytest.approx((-limit, limit), rel=1e-4)
    assert (of_mean.x0, of_mean.x1) == pytest.approx((-limit / math.sqrt(3), limit / math.sqrt(3)), rel=1e-4)
    assert "guidance 1.5" in distance.get_xlabel() and "lower is better" in distance.get_xlabel()
    assert sorted(distance.lines[1].get_xdata()) == pytest.approx([-60, -20, -10])
    low, high = loss.get_xlim()
    assert low < -limit and high > max(limit, 0.9)


def test_what_has_no_pairs_is_not_drawn_and_one_seed_has_no_interval():
    study = study_of(VALUES, seeds=1)
    first = {name: values[:1] for name, values in VALUES.items()}
    figure = draw_differences(study, rows_of(first))
    assert not figure.axes[0].patches and "Shaded" not in figure._suptitle.get_text()
    assert sorted(figure.axes[0].lines[1].get_xdata()) == pytest.approx([-0.2])
    lone = rows_of({"dense": [1.0]})
    assert draw_differences(study, lone) is None
    report = report_pictures(study, lone, [])
    assert any("differences.png: not written: no other model has a run on a seed of the baseline" in x for x in report)


# ---- many of them


def test_holm_on_a_published_example():
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02; a tie and a cap at 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.02, 0.02]) == pytest.approx([0.9, 0.06, 0.06]) and holm([0.7, 0.8]) == [1.0, 1.0]
    assert adjusted([None, 0.02, None, 0.04]) == [None, 0.04, None, 0.04] and holm([]) == []


def test_p_values_are_those_of_the_t_test_and_agree_with_the_intervals():
    """Three values 1, 2, 3: t = 2 sqrt(3), whose p-value with two degrees of freedom is 1 - t / sqrt(2 + t^2)."""
    t = 2 * math.sqrt(3)
    assert mean_of([1.0, 2.0, 3.0]).p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert mean_of([1.0]).p is None and mean_of([1.0, 1.0]).p == 0 and mean_of([0.0, 0.0]).p == 1
    for values in ([1.0, 1.2, 1.9], [0.1, 1.2, 3.0], [2.0, -1.0]):
        assert (mean_of(values).p < 0.05) == mean_of(values).differs


def test_without_an_effect_plain_intervals_mislead_and_adjusted_ones_do_not():
    """Ten models and a baseline of three seeds, no effect, 400 studies: all differences share the baseline's noise.

    At 5 %, the standard error of 400 studies is 1.1 %.
    """
    generator = np.random.default_rng(7)
    any_plain = any_adjusted = 0
    for _ in range(400):
        noise_MS = generator.standard_normal((11, 3))
        d_MS = noise_MS[1:] - noise_MS[0]
        t_M = np.abs(d_MS.mean(1)) / (d_MS.std(1, ddof=1) / math.sqrt(3))
        p_values = list(1 - t_M / np.sqrt(2 + t_M**2))  # two degrees of freedom
        corrected = holm(p_values)
        any_plain += min(p_values) < 0.05
        any_adjusted += min(corrected) < 0.05
        lone = any(p < 0.05 <= q for p, q in zip(p_values, corrected, strict=True))
        assert bool(warning([str(i) for i in range(10)], p_values)) == lone
    assert any_plain > 0.15 * 400, "a false difference in every few studies"
    assert any_adjusted <= 0.08 * 400


def test_the_report_warns_where_only_plain_intervals_exclude_zero():
    """`b`: differences -1 ± 0.1, t 17.3 and p 0.0033; `c`: -1 ± 0.3, t 5.77 and p 0.0287, twice of which is 0.057."""
    values = {"dense": [1.0, 2.0, 3.0], "b": [0.1, 1.0, 1.9], "c": [0.3, 1.0, 1.7], "d": [1.5, 2.0, 2.6]}
    study, rows = study_of(values), rows_of(values)
    text = to_markdown(rows, study.recipe, [], ["dense"])
    table = text.partition("## Against dense")[2].partition("\n\n## ")[0]
    lines = {line.split(" | ")[0][2:]: line for line in table.splitlines() if line.startswith("| ")}
    assert lines["b"].endswith("| 3 | yes | 0.0033 | 0.01 |") and lines["c"].endswith("| 3 | yes | 0.029 | 0.057 |")
    assert "Of 3 intervals, those that exclude zero: 2. Without any effect, 0.15 would on average" in table
    assert "at least one in 14% of studies" in table and "for all 3: 1." in table
    assert (
        "**Warning: 2 of 3 intervals exclude zero, but after Holm's adjustment 1.** Those of c may be chance" in table
    )
    alone = {name: values[name] for name in ("dense", "b")}
    text = to_markdown(rows_of(alone), made(alone), [], ["dense"])
    assert "There is one interval" in text and "Warning" not in text

    written = difference_rows(rows, study.recipe, ["dense", "b"])
    assert len(written) == 2 * 3 * 3
    line = next(x for x in written if (x["against"], x["metric"], x["variant"]) == ("dense", f"{DISTANCE}1.5", "c"))
    assert line["difference"] == pytest.approx(-100) and line["p_holm"] == pytest.approx(2 * line["p"])
    assert line["p"] == pytest.approx(1 - 1 / math.sqrt(1 + 2 / (1 / (0.3 / math.sqrt(3))) ** 2), rel=1e-6)


def test_images_have_the_same_count_and_warning():
    values = {"dense": [1.0, 2.0, 3.0], "b": [0.1, 1.0, 1.9], "c": [0.3, 1.0, 1.7], "d": [1.5, 2.0, 2.6]}
    study, rows = study_of(values), rows_of(values)
    figures = [
        {"task": row["task"], "variant": row["variant"], "seed": row["seed"], "step": 9, "guidance": 1.5, "count": 200}
        | {"figure": "Fréchet distance (X)", "value": row[f"{DISTANCE}1.5"]}
        for row in rows
    ]
    text = "\n".join(mean_sections(rows, study.recipe, figures))
    assert "Of 3 intervals, those that exclude zero: 2." in text and "Those of c (guidance 1.5) may be" in text


def test_the_page_of_a_study_begins_with_the_noise_and_cautions_too(monkeypatch):
    """Without plotly, which may not be installed."""
    for name, made_by in (("loss_figure", None), ("difference_figure", "drawn"), ("evaluation_figures", {})):
        monkeypatch.setattr(report, name, lambda *_, result=made_by: result)
    monkeypatch.setattr(report, "figure_html", lambda figures: [])
    values = {"dense": [1.0, 2.0, 3.0], "b": [0.1, 1.0, 1.9], "c": [0.3, 1.0, 1.7], "d": [1.5, 2.0, 2.6]}
    text = "".join(report.sections(study_of(values), rows_of(values), [], ["dense"], Path("report.html")))
    assert text.index("By chance alone, two single runs differ in loss") < text.index("<h2>Models")
    assert "Of 3 intervals, those that exclude zero: 2." in text and "**" not in text
    assert "Warning: 2 of 3 intervals exclude zero, but after Holm&#x27;s adjustment 1." in text
