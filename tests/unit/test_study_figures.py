"""Figures of drawn images in a study: means over seeds, curves, and why a file that is promised is not there."""

import csv
import json

import pytest
from matplotlib.colors import to_rgb
from support.image_evaluations import evaluated, record, write
from support.small_studies import finished, recipe, rows

from megapromoe.cli import main
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.evaluation_plots import draw_evaluations
from megapromoe.studies.figure_tables import mean_figures
from megapromoe.studies.image_plots import draw_images
from megapromoe.studies.json_files import metrics
from megapromoe.studies.plots import draw_compute, draw_routing

# ---- what is made of them


def value_of(task, step, guidance):
    """Falls over the steps; more experts are better; seeds differ by 2."""
    return 100.0 / step - task.config.model.num_experts + 2 * task.seed + guidance


@pytest.fixture
def study(tmp_path):
    variants = {"promoe": {}, "dense": {"settings": {"model.router": "dense"}, "without": ["model.num_experts"]}}
    study = finished(tmp_path / "s", evaluated(variants=variants, baseline="dense"))
    for task in study.tasks:
        write(study.run(task), [record(s, g, value_of(task, s, g)) for s in (2, 4, 6) for g in (1.0, 1.5)])
    return study


def test_figures_are_gathered_with_intervals_over_seeds(study, capsys):
    assert main(["study", "collect", str(study.folder)]) == 0
    lines = list(csv.DictReader((study.folder / "evaluations.csv").read_text().splitlines()))
    assert len(lines) == 3 * 3 * 2
    line = next(x for x in lines if x["model.num_experts"] == "4" and x["step"] == "6" and x["guidance"] == "1.5")
    assert float(line["mean"]) == pytest.approx(100 / 6 - 4 + 1 + 1.5) and line["seeds"] == "2"
    # Two values that differ by 2: half the interval is t(0.975, 1) · √2 / √2 = 12.706.
    assert float(line["half_interval"]) == pytest.approx(12.7062, abs=1e-3)
    text = (study.folder / "results.md").read_text()
    section = text.partition("## Sampled images, mean over seeds")[2].partition("\n## ")[0]
    assert "| model | guidance 1 | minus dense | guidance 1.5 | minus dense |" in section
    assert "| promoe num_experts=4 | 14.67 ± 13 | +0 ± 0 |" in section, "dense has four experts in its config"
    assert "At guidance 1.5, of the checkpoint of each step:" in section
    assert "| model | step 2 | step 4 | step 6 |" in section


def test_one_seed_has_no_interval(tmp_path):
    study = finished(tmp_path, evaluated(seeds=[0], axes={}))
    write(study.run(study.tasks[0]), [record(6, 1.0, 9.0)])
    from megapromoe.studies.curves import figures

    (mean,) = mean_figures(figures(study, study.tasks[0]), study.recipe)
    assert mean["mean"] == 9.0 and mean["half_interval"] is None and mean["seeds"] == 1


def test_the_curves_are_drawn_with_their_intervals(study):
    figure = draw_evaluations(study, rows(study))
    assert [ax.get_title() for ax in figure.axes] == ["guidance 1", "guidance 1.5"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines) == ["promoe num_experts=2", "promoe num_experts=4", "dense"]
    expected = [[step, 100 / step - 4 + 1 + 1.5] for step in (2, 4, 6)]
    assert lines["promoe num_experts=4"].get_xydata().tolist() == [pytest.approx(point) for point in expected]
    assert (
        to_rgb(lines["dense"].get_color()) == (0.0, 0.0, 0.0)
        and len({line.get_color() for line in lines.values()}) == 3
    )
    assert len(figure.axes[1].collections) == 3 and figure.axes[0].get_ylabel() == "Fréchet distance (X), 200 images"


def test_scores_may_be_zero_and_are_better_if_higher(study, capsys):
    """A logarithmic axis or a quotient would fail; the first steps of a model of texts get nothing right."""
    for task in study.tasks:
        (study.run(task) / "evaluation.jsonl").unlink()
        scores = {2: 0.0, 4: 0.25, 6: 0.5 + task.seed / 10}
        figures = {"right pictures, overall": 0.0}
        write(study.run(task), [record(s, 1.0, figures=figures | dict.fromkeys(figures, x)) for s, x in scores.items()])
    figure = draw_evaluations(study, rows(study))
    (ax,) = figure.axes
    assert ax.get_yscale() == "linear" and ax.get_ylabel() == "right pictures, overall, 200 images"
    assert "higher is better" in figure._suptitle.get_text()
    box = figure._suptitle.get_window_extent(figure.canvas.get_renderer())
    assert 0 < box.x0 < box.x1 < figure.bbox.width, "the title of one panel has two lines"
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.25, 0.55])
    course = next(ax for ax in draw_images(study, rows(study)).axes if ax.get_label() == "course")
    assert course.get_yscale() == "linear" and not course.get_ylabel().endswith("/ that of dense")
    assert course.lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.25, 0.55])
    assert main(["study", "collect", str(study.folder)]) == 0
    assert "right pictures, overall, 200 images: mean ± half" in (study.folder / "results.md").read_text()


@pytest.mark.full
def test_curves_are_means_of_the_seeds_that_all_models_have(study):
    """Seeds differ by more than models do: a model whose second seed is missing would look better."""
    for task in study.tasks:
        lines = metrics(study.run(task))
        for line in lines:
            line |= {name: line[name] + task.seed for name in (DENOISING_LOSS, "dead_experts") if name in line}
        (study.run(task) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = [row for row in rows(study) if row["seed"] == 0 or row["experts"] == 2]
    (ax, _) = draw_evaluations(study, done).axes
    (of_first_seeds, _) = draw_evaluations(study, [row for row in done if row["seed"] == 0]).axes
    for line, expected in zip(ax.lines, of_first_seeds.lines, strict=True):
        assert line.get_xydata().tolist() == expected.get_xydata().tolist()
    assert "lower is better; seed 0" in ax.figure._suptitle.get_text()
    titles = [ax.get_title() for ax in draw_images(study, done).axes]
    assert any("training, seed 0" in title for title in titles) and not any("mean of the" in title for title in titles)
    for draw in (draw_compute, draw_routing):
        drawn = [draw(study, chosen).axes[0].lines for chosen in (done, [row for row in done if row["seed"] == 0])]
        for line, expected in zip(*drawn, strict=True):
            assert line.get_xydata().tolist() == expected.get_xydata().tolist()
    apart = [row for row in done if row["seed"] == (row["variant"] == "promoe")]
    text = draw_evaluations(study, apart).get_suptitle().replace("\n", " ")
    assert "mean of the seeds that each model has" in text


def test_one_step_makes_no_picture_of_curves(tmp_path):
    study = finished(tmp_path, evaluated({"num": 200, "steps": 4, "features": "digits", "guidance": [1.0]}))
    for task in study.tasks:
        write(study.run(task), [record(6, 1.0)])
    assert draw_evaluations(study, rows(study)) is None


# ---- why a promised file is not there


def printed(command, study, capsys) -> list[str]:
    main(["study", command, str(study.folder)])
    return capsys.readouterr().out.splitlines()


def test_collect_prints_why_a_file_is_not_written(tmp_path, capsys):
    study = finished(tmp_path / "s", recipe())
    lines = printed("collect", study, capsys)
    for name in ("curves.csv", "evaluations.csv"):
        (line,) = [line for line in lines if line.startswith(f"{study.folder / name}: not written: ")]
        assert "no images were evaluated; add a section `evaluate` to the recipe" in line
    assert str(study.folder / "results.csv") in lines
    for made, reason in (
        (evaluated(), "no evaluation is done; run `megapromoe study run"),
        (evaluated({"num": 200, "steps": 4, "features": "digits"}), "the recipe evaluates the last checkpoint alone"),
    ):
        other = finished(tmp_path / reason[:9], made)
        if "alone" in reason:
            for task in other.tasks:
                write(other.run(task), [record(6, 1.5)])
        lines = printed("collect", other, capsys)
        assert any(line.startswith(f"{other.folder / 'curves.csv'}: not written: {reason}") for line in lines)


def test_a_file_of_an_earlier_collect_is_called_older(study, capsys):
    assert str(study.folder / "curves.csv") in printed("collect", study, capsys)
    for task in study.tasks:
        (study.run(task) / "evaluation.jsonl").unlink()
    (line,) = [line for line in printed("collect", study, capsys) if "curves.csv" in line]
    assert line.endswith("; the file that is there is older")


def test_plot_prints_why_a_picture_is_not_drawn(tmp_path, capsys):
    study = finished(tmp_path / "s", recipe(axes={}))
    lines = printed("plot", study, capsys)
    assert any(
        "loss_experts.png: not written: it needs tasks of two numbers of experts, and there is one" in x for x in lines
    )
    assert any("images.png: not written: no images were evaluated" in line for line in lines)
    for name in ("loss_compute", "routing", "cost"):
        assert str(study.folder / f"{name}.png") in lines
    for name in ("loss_experts", "images", "evaluations"):
        assert not (study.folder / f"{name}.png").exists()
