"""What a study says: collected numbers, differences, trends, fits, pictures, against definitions and known answers."""

import csv
import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.small_studies import TINY, compared, finished, recipe, rows

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Digits
from megapromoe.evaluation.heldout import objective_loss
from megapromoe.planning.cost import parameters
from megapromoe.plot_styles import assign
from megapromoe.studies.collect import evaluated, row
from megapromoe.studies.comparison import compare
from megapromoe.studies.curves import Curves, curves_of
from megapromoe.studies.fit import FitError, fit_power_law
from megapromoe.studies.grid import expand
from megapromoe.studies.image_plots import _draw_course, draw_images
from megapromoe.studies.plots import draw_all
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.tables import differences, fits, groups, mean_of, to_csv, to_markdown, trends


def test_collected_numbers_are_exact(tmp_path):
    study = finished(tmp_path, compared(settings=TINY | {"train.steps": 20}))
    result = row(study, study.tasks[0])
    assert result["training_loss"] == 1 + 19.5 and result["dead_experts"] == 19.5, "steps 19 and 20: the last tenth"
    assert result["dead_share"] == 19.5 / 2
    assert result["images_per_second"] == 100 + (10**2 + 11**2) / 2
    assert result["memory_bytes"] == 999 and result["fixed_loss"] == 0.5
    assert result["images"] == 320 and result["experts"] == 2 and result["model.num_experts"] == 2
    assert result["training_flops"] == result["flops_per_image"] * 320
    dense = next(r for r in rows(study) if r["variant"] == "dense")
    assert dense["experts"] is None and dense["dead_share"] is None and "model.num_experts" not in dense
    table = list(csv.DictReader(to_csv(rows(study)).splitlines()))
    assert len(table) == 10 and float(table[0]["training_loss"]) == 20.5 and table[2]["experts"] == ""


def test_a_loss_of_another_checkpoint_does_not_count(tmp_path, capsys):
    study = finished(tmp_path, recipe(seeds=[0]))
    first, other = study.tasks
    file = study.loss_file(first)
    file.write_text(file.read_text().replace('"step": 3', '"step": 2'))
    assert not evaluated(study, first) and evaluated(study, other) and not evaluated(study, other, draws=5)
    file.write_text(file.read_text().replace('"step": 2', '"step": 3').replace('"ema"', '"master"'))
    assert not evaluated(study, first), "of other weights"
    with pytest.raises(StudyError, match="not computed yet"):
        row(study, first)
    assert main(["study", "plot", str(tmp_path)]) == 0
    assert f"not computed yet (run `collect`): {first.name}" in capsys.readouterr().err


def test_baselines_leave_out_what_belongs_to_promoe_experts():
    """A base with several shared and unconditional experts, and a width of the shared ones."""
    settings = {
        "model.num_shared_experts": "2",
        "model.shared_expert_width": "32",
        "model.num_unconditional_experts": "3",
    }
    made = compare("digits", routers=("promoe", "tc", "ec", "diffmoe", "dense"), seeds=(0,), settings=settings)
    tasks = {task.variant: task.config.model for task in expand(made)}
    assert (tasks["promoe"].shared_experts, tasks["promoe"].unconditional_experts) == (2, 3)
    assert all(tasks[name].shared_experts == 0 for name in ("tc", "ec", "diffmoe", "dense"))
    active = {name: parameters(model).active for name, model in tasks.items()}
    assert max(active.values()) < 1.02 * min(active.values())


def test_differences_pair_the_seeds(tmp_path):
    # Seeds differ wildly, pairs hardly: tc is 0.1 and 0.12 above dense with 2 experts, 0.2 and 0.22 with 4.
    def loss(task):
        extra = {"dense": 0.0, "promoe": -0.3, "tc": 0.05 * task.config.model.num_experts + 0.02 * task.seed}
        return 10.0 * task.seed + extra[task.variant]

    study = finished(tmp_path, compared(), loss)
    result = differences(rows(study), study.recipe, "dense")
    assert result["tc", (("model.num_experts", 2),)].mean == pytest.approx(0.11)
    assert result["tc", (("model.num_experts", 4),)].mean == pytest.approx(0.21)
    assert result["promoe", (("model.num_experts", 4),)].mean == pytest.approx(-0.3)
    assert not result["tc", (("model.num_experts", 2),)].differs, "two seeds 0.02 apart say ± 0.127"
    assert result["promoe", (("model.num_experts", 4),)].differs
    assert not [key for key in result if key[0] == "dense"]
    assert result["tc", None].mean == pytest.approx(0.16) and result["tc", None].runs == 2
    assert result["tc", None].half == pytest.approx(12.7062 * 0.01, rel=1e-4), "0.15 and 0.17: two seeds, not four runs"
    to_tc = differences(rows(study), study.recipe, "tc")
    assert to_tc["dense", ()].mean == pytest.approx(-0.16) and to_tc["dense", ()].runs == 2
    assert to_tc["promoe", (("model.num_experts", 4),)].mean == pytest.approx(-0.51)
    text = to_markdown(rows(study), study.recipe, ["x (failed)"], ["dense"])
    assert "| tc num_experts=2 | +0.1100 ± 0.1271 | 2 | no |" in text and "x (failed)" in text
    assert list(groups(rows(study), study.recipe))[-1] == ("dense", ())


def test_a_trend_is_detected_despite_differences_of_seeds(tmp_path):
    slopes = (0.1, 0.2)
    made = recipe(axes={"model.num_experts": [2, 4, 8]})
    study = finished(tmp_path, made, lambda t: 5 * t.seed + slopes[t.seed] * math.log2(t.config.model.num_experts))
    result = trends(rows(study), study.recipe)
    assert result["promoe", ()].mean == pytest.approx(0.15) and result["promoe", ()].runs == 2
    assert result["promoe", ()].half == pytest.approx(12.7062 * 0.05, rel=1e-4)
    partial = [r for r in rows(study) if not (r["seed"] == 1 and r["experts"] == 8)]
    assert trends(partial, study.recipe)["promoe", ()].mean == pytest.approx(0.1)


def test_interval_of_a_mean():
    mean = mean_of([1.0, 2.0, 3.0])
    assert mean.mean == 2.0 and mean.half == pytest.approx(4.3026527 / math.sqrt(3))  # Student's t, two degrees
    assert mean_of([1.0]).half is None and not mean_of([1.0]).differs


# ---- fits


def runs_of(a, b, c, noise, seed, points=(4, 8, 16, 32, 64, 128), seeds=4):
    x = np.repeat(np.array(points, dtype=float), seeds)
    return x, a + b * x**-c + noise * np.random.default_rng(seed).standard_normal(len(x))


def test_a_known_law_is_found_within_its_own_interval():
    hits, doubted = [], 0
    for trial in range(20):
        x, loss = runs_of(0.4, 0.3, 0.7, 0.002, trial)
        law = fit_power_law(x, loss, replicates=400, seed=trial)
        assert law.c == pytest.approx(0.7, abs=0.2)
        doubted += bool(law.fit_warnings)
        low, high = law.band(np.array([10.0]))
        hits.append(
            (
                law.a_interval[0] <= 0.4 <= law.a_interval[1],
                law.c_interval[0] <= 0.7 <= law.c_interval[1],
                low[0] <= 0.4 + 0.3 * 10**-0.7 <= high[0],
            )
        )
    assert doubted <= 4, "a test at the 5 % level fit_warnings one true law in 20"
    assert np.mean(hits, axis=0).min() >= 0.8, "intervals of 95 % should not miss more than 4 times in 20"
    widths = [np.ptp(fit_power_law(*runs_of(0.4, 0.3, 0.7, s, 3), replicates=400).c_interval) for s in (0.001, 0.004)]
    assert widths[1] > 2 * widths[0], "more noise, wider intervals"


def test_an_exact_law_is_found_in_any_unit():
    x = np.repeat([1e18, 3e18, 1e19, 1e20, 1e21], 2)
    loss = 1.5 + 4e5 * x**-0.3
    law = fit_power_law(x, loss + np.tile([1e-9, -1e-9], 5))
    assert (law.a, law.c) == pytest.approx((1.5, 0.3), rel=1e-4)
    assert law.at(x) == pytest.approx(loss, rel=1e-6)


def test_laws_that_the_data_do_not_support_are_doubted():
    x, flat = runs_of(0.4, 0.0, 1.0, 0.003, 5)
    assert any("no more than with the seed" in doubt for doubt in fit_power_law(x, flat).fit_warnings)
    x, rising = runs_of(0.4, -0.3, 0.7, 0.002, 5)
    assert any("rises" in doubt for doubt in fit_power_law(x, rising).fit_warnings)
    x = np.repeat([4.0, 8, 16, 32, 64], 3)
    bumpy = np.repeat([1.0, 0.5, 0.9, 0.4, 0.8], 3) + np.tile([-0.01, 0, 0.01], 5)
    assert any("off the law" in doubt for doubt in fit_power_law(x, bumpy).fit_warnings)


@pytest.mark.parametrize(
    "x, loss, why",
    [
        ([4, 4, 8, 8], [1, 1.1, 0.9, 0.8], "2 different x"),
        ([4, 4, 8, 16], [1, 1.1, 0.9, 0.8], "3 different x"),
        ([4, 8, 16, 32], [1, 0.9, 0.8, 0.7], "two seeds"),
        (
            [10, 10, 11, 12, 13],
            [1, 1, 0.9, 0.8, 0.7],
            "ranges from 10 to 13; a fit needs a range of at least a factor 2",
        ),
        ([0, 4, 8, 16, 16], [1, 1, 0.9, 0.8, 0.7], "must be positive"),
        ([4, 4, 8, 16, 32], [1, math.nan, 0.9, 0.8, 0.7], "must be positive, and all of it finite"),
    ],
)
def test_no_law_is_put_through_too_little(x, loss, why):
    with pytest.raises(FitError, match=why):
        fit_power_law(np.array(x, dtype=float), np.array(loss, dtype=float))


@pytest.mark.full
def test_pictures_of_every_kind_of_study(tmp_path):
    steps = {"train.steps": [3, 6, 12, 24]}
    settings = {key: value for key, value in TINY.items() if key != "train.steps"}
    shown = {
        "lone": (recipe(seeds=[0], axes={}), {"loss_compute", "routing", "cost"}),
        "experts": (compared(), {"differences", "loss_experts", "loss_compute", "routing", "cost"}),
        "steps": (recipe(axes=steps, settings=settings), {"loss_compute", "routing", "cost"}),
        "dense": (recipe(axes=steps, settings=settings | {"model.router": "dense"}), {"loss_compute", "cost"}),
    }
    for name, (made, pictures) in shown.items():
        study = finished(tmp_path / name, made, lambda task: 1 / task.config.train.steps + 0.001 * task.seed)
        paths = draw_all(study, rows(study), "a note")
        assert {path.stem for path in paths} == pictures and all(path.stat().st_size > 5000 for path in paths)


def test_fits_go_along_experts_and_along_compute(tmp_path):
    made = recipe(
        axes={"model.num_experts": [2, 4, 8, 16], "train.steps": [3, 6, 12, 24]},
        settings={key: value for key, value in TINY.items() if key != "train.steps"},
    )
    study = finished(
        tmp_path, made, lambda t: 1 / t.config.model.num_experts + 1 / t.config.train.steps + 0.001 * t.seed
    )
    result = fits(rows(study), study.recipe)
    assert set(result) == {
        *(("promoe", "experts", (("train.steps", steps),)) for steps in (3, 6, 12, 24)),
        *(("promoe", "training_flops", (("model.num_experts", experts),)) for experts in (2, 4, 8, 16)),
    }
    assert all(law.c == pytest.approx(1, abs=0.02) and not law.fit_warnings for law in result.values())


# ---- the held-out loss


def test_the_held_out_loss_follows_its_definition():
    import torch

    from megapromoe.diffusion.noise import normals, permutation

    config = resolve("digits", overrides=["sample.batch=7"])
    dataset = Digits()

    class Guess(torch.nn.Linear):  # a velocity of the noise level and the label
        def forward(self, x_BCHW, t_B, y_B, conditional):
            assert conditional == len(y_B)
            guess_B = t_B / 1000 + 0.1 * y_B
            return guess_B[:, None, None, None].expand(-1, 2, 8, 8), None

    model = Guess(1, 1)
    mean, error = objective_loss(model, config, dataset, draws=40, seed=3)
    record = permutation(3, "held-out record", 0, 1797)[:40]
    noise = normals(3, "held-out noise", np.arange(40), (1, 8, 8))
    u = (permutation(3, "held-out time", 0, 40) + 0.5) / 40
    assert sorted(u) == pytest.approx(np.arange(40) / 40 + 1 / 80), "every stretch of the times once"
    level = 1 / (1 + np.exp(-np.vectorize(NormalDist().inv_cdf)(u)))
    guess = level + 0.1 * dataset.labels[record]
    expected = ((guess[:, None, None, None] - noise + dataset.images[record]) ** 2).reshape(40, -1).mean(1)
    assert mean == pytest.approx(expected.mean(), rel=1e-5)
    assert error == pytest.approx(expected.std(ddof=1) / math.sqrt(40), rel=1e-4)
    assert objective_loss(model, config, dataset, draws=40, seed=4)[0] != mean
    assert objective_loss(model, resolve("digits"), dataset, draws=40, seed=3)[0] == pytest.approx(mean, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        objective_loss(model, config, dataset, draws=1)


def test_metrics_of_sampled_images_are_collected(tmp_path):
    study = finished(tmp_path, recipe(axes={}))
    first, second = study.tasks
    for task, old, new in ((first, 9.0, 1.5), (second, 9.0, 2.5)):
        records = [
            {"step": 3, "guidance": 1.0, "count": 1500, "figures": {"Fréchet distance (X)": old}},
            {"step": 3, "guidance": 1.0, "count": 1500, "figures": {"Fréchet distance (X)": new, "recall (X)": 0.5}},
            {"step": 3, "guidance": 2.0, "count": 1500, "figures": {"Fréchet distance (X)": 7.0}},
            {"step": 2, "guidance": 3.0, "count": 1500, "figures": {"Fréchet distance (X)": 99.0}},
            {"step": 3, "guidance": 5.0, "count": 360, "figures": {"right, colours": old, "right, position": new}},
        ]
        text = "\n".join(json.dumps(record) for record in records)
        (study.run(task) / "evaluation.jsonl").write_text(text + '\n{"step": 3, half a li')
    results = rows(study)
    name = "evaluated: Fréchet distance (X), 1,500 images, guidance "
    assert [(row[name + "1"], row[name + "2"]) for row in results] == [(1.5, 7.0), (2.5, 7.0)]
    text = to_markdown(results, study.recipe, [], ["promoe"])
    assert "1,500 images, guidance 1, features of X" in text and "| promoe | 1.5 / 2.5 | 0.5 / 0.5 |" in text
    assert "1,500 images, guidance 2, features of X" in text and "| promoe | 7 / 7 |" in text
    assert "360 images, guidance 5; the metric of each seed" in text, "scores of scenes use no network"
    assert "| model | right, colours | right, position |" in text and "| promoe | 9 / 9 | 1.5 / 2.5 |" in text
    losses, distances = draw_images(study, results).axes  # each scale at one step: nothing over training
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0]]  # 1 + step, averaged over three steps
    assert sorted(y for line in distances.lines for y in line.get_xdata()) == [1.5, 2.5, 7.0, 7.0]
    assert draw_images(study, rows(finished(tmp_path / "unseen", recipe(axes={})))) is None


def evaluations(study, values):
    """Writes evaluation.jsonl of each task: `values(task)` gives (step, guidance, count, distance), oldest first."""
    for task in study.tasks:
        records = [
            {
                "step": step,
                "guidance": guidance,
                "count": count,
                "figures": {"Fréchet distance (X)": d, "recall (X)": 0.5},
            }
            for step, guidance, count, d in values(task)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (study.run(task) / "evaluation.jsonl").write_text(text + '{"step": 3, half a li')


def distance(task, step, guidance=2.0):
    return 100.0 / step + 10 * task.config.model.num_experts + task.seed + 50 / guidance


def of_three_steps(task):
    """At two scales; once twice, once of more images, and one seed of four experts lacks step 2 at the higher scale."""
    yield 2, 1.0, 1500, -1.0
    for step in (3, 1, 2):
        for guidance in (2.0, 1.0):
            if (task.config.model.num_experts, task.seed, step, guidance) != (4, 1, 2, 2.0):
                yield step, guidance, 1500, distance(task, step, guidance)
    for step in (1, 2, 3):
        yield step, 5.0, 9000, 7.0


def test_metrics_over_training_are_written_and_plotted(tmp_path, capsys):
    study = finished(tmp_path, recipe())
    evaluations(study, of_three_steps)
    assert main(["study", "collect", str(tmp_path)]) == 0
    lines = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert len(lines) == 2 * (4 * (6 + 3) - 1), "the newest of each"
    values = {}
    for line in lines:
        if line["figure"] == "Fréchet distance (X)" and line["count"] == "1500":
            key = ("variant", "model.num_experts", "seed", "step", "guidance")
            values[tuple(line[name] for name in key)] = float(line["value"])
    expected = {}
    for task in study.tasks:
        for step, guidance, count, value in of_three_steps(task):
            if count == 1500:
                identity = ("promoe", str(task.config.model.num_experts), str(task.seed), str(step), f"{guidance:g}")
                expected[identity] = pytest.approx(value, rel=1e-6)
    assert values == expected and min(values.values()) > 0

    text = (tmp_path / "results.md").read_text()
    section = text.partition("## Over training\n\n")[2].partition("\n\n## ")[0]
    assert section.startswith("Each seed's Fréchet distance (X), 1,500 images, guidance 2, ")
    assert section.splitlines()[2:] == [
        "| model | step 1 | step 2 | step 3 |",
        "| --- | --- | --- | --- |",
        "| promoe num_experts=2 | 145 / 146 | 95 / 96 | 78.3 / 79.3 |",
        "| promoe num_experts=4 | 165 / 166 | 115 | 98.3 / 99.3 |",
    ]

    axes = {ax.get_label(): ax for ax in draw_images(study, rows(study)).axes}
    assert list(axes) == ["losses", "course", "ends"] and "guidance 2" in axes["course"].get_title()
    drawn = [line.get_xydata().tolist() for line in axes["course"].lines]
    two = [[step, 100 / step + 20 + 0.5 + 25] for step in (1, 2, 3)]
    four = [[step, pytest.approx(100 / step + 40 + 0.5 + 25)] for step in (1, 3)]  # that both seeds have
    assert drawn == [pytest.approx(np.array(two)), four]
    colours = [[line.get_color() for line in axes[name].lines] for name in ("losses", "course")]
    assert colours[0] == colours[1] and len(set(colours[0])) == 2


def test_figures_over_training_are_multiples_of_the_baselines():
    curves = Curves("D (X), 500 images", 1.5, {})
    means = {("promoe", ()): {1: 30.0, 2: 9.0, 3: 1.0}, ("dense", ()): {1: 20.0, 2: 10.0}}
    styles = assign(list(means), ("dense", ()))
    ax = Figure().subplots()
    _draw_course(ax, curves, means, styles, "dense", "mean of 2 seeds")
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 1.5], [2, 0.9]], [[1, 1.0], [2, 1.0]]]
    assert ax.get_title() == "over training, mean of 2 seeds; guidance 1.5; dense: 20, 10"
    assert ax.get_ylabel().endswith("/ that of dense")


def test_one_step_makes_no_curve(tmp_path, capsys):
    study = finished(tmp_path, recipe())
    evaluations(study, lambda task: [(3, 1.0, 1500, 9.0), (3, 2.0, 1500, 8.0)])
    assert main(["study", "collect", str(tmp_path)]) == 0
    assert not (tmp_path / "curves.csv").exists()
    assert "## Over training" not in (tmp_path / "results.md").read_text()
    assert [ax.get_label() for ax in draw_images(study, rows(study)).axes] == ["losses", "ends"]
    # Two steps, but of no model at all of its seeds: kept as numbers, and not drawn.
    evaluations(study, lambda task: [(3, 1.0, 1500, 9.0)] + [(2, 1.0, 1500, 9.5)] * task.seed)
    assert main(["study", "collect", str(tmp_path)]) == 0
    assert (tmp_path / "curves.csv").is_file()
    assert "| promoe num_experts=2 | 9.5 | 9 / 9 |" in (tmp_path / "results.md").read_text()
    assert [ax.get_label() for ax in draw_images(study, rows(study)).axes] == ["losses", "ends"]


def test_curves_are_of_the_scale_with_most_steps():
    def rows_of(*places):
        row = {"figure": "D (X)", "count": 1500}
        return [row | {"task": t, "step": s, "guidance": g, "value": 10.0 * s + g} for t, s, g in places]

    name = "D (X), 1,500 images"
    most = rows_of(("a", 2, 1.0), ("a", 1, 1.0), ("b", 1, 1.0), ("a", 2, 4.0), ("b", 1, 4.0), ("c", 3, 4.0))
    curves = curves_of(most, name)
    assert curves.guidance == 1.0, "of one run: three runs at a step each are no curve"
    assert curves.values == {"a": {1: 11.0, 2: 21.0}, "b": {1: 11.0}} and curves.steps == [1, 2]
    assert curves.mean(["a", "b"]) == {1: 11.0} and curves.mean(["a", "c"]) == {}
    assert curves_of(rows_of(("a", 1, 2.0), ("a", 2, 2.0), ("a", 1, 1.5), ("a", 2, 1.5)), name).guidance == 2.0
    assert curves_of(most, "D (X), 500 images") is None and curves_of(most[3:], name) is None
