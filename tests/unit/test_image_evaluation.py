"""The section `evaluate` of a recipe: what it asks for, what is refused, which records count, and their means."""

import csv
import json

import pytest
import yaml
from support.small_studies import TINY, finished, recipe, rows

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.evaluation import features, names
from megapromoe.studies.evaluation_plots import draw_evaluations
from megapromoe.studies.evaluations import evaluation_of
from megapromoe.studies.figure_tables import mean_figures
from megapromoe.studies.grid import expand
from megapromoe.studies.image_evaluation import ImageEvaluation, problems_of
from megapromoe.studies.recipe import StudyError, make_recipe, recipe_dict

SECTION = {"num": 200, "guidance": [1.0, 1.5], "steps": 4, "every": 2, "features": "digits"}


def evaluated(section=SECTION, **changes):
    settings = {key: value for key, value in TINY.items() if key != "train.save_every"} | {"train.steps": 6}
    return recipe(**({"settings": settings, "evaluate": section} | changes))


# ---- what is asked for


def test_the_section_survives_writing():
    for section in (SECTION, {"num": 300}, {"num": 300, "reference": "photos/real", "features": "inception.pth"}):
        made = evaluated(section)
        assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(made)))) == made
    assert "evaluate" not in recipe_dict(recipe())


def test_steps_scales_and_the_sampler():
    config = resolve("digits", overrides=["train.steps=10", "train.warmup=0", "sample.steps=7", "sample.guidance=2"])
    assert ImageEvaluation(num=1, every=4).training_steps(config) == (4, 8, 10)
    assert ImageEvaluation(num=1, every=5).training_steps(config) == (5, 10), "the last step once"
    assert ImageEvaluation(num=1).training_steps(config) == (10,)
    assert ImageEvaluation(num=1).scales(config) == (2.0,) and ImageEvaluation(num=1).sampler_steps(config) == 7


def test_tasks_keep_the_checkpoints_that_are_evaluated():
    for task in expand(evaluated()):
        train = task.config.train
        assert train.steps == 6 and train.save_every > 0 and train.keep_every > 0
        assert 2 % train.save_every == 0 and 2 % train.keep_every == 0
    for task in expand(evaluated({"num": 200})):
        assert task.config.train.keep_every == 0, "the last checkpoint is always kept"
    given = {"settings": TINY | {"train.steps": 6, "train.save_every": 1, "train.keep_every": 1}}
    assert {task.config.train.save_every for task in expand(evaluated(**given))} == {1}


def test_settings_that_remove_these_checkpoints_are_refused():
    made = evaluated(settings=TINY | {"train.steps": 9, "train.save_every": 3, "train.keep_every": 4})
    with pytest.raises(StudyError) as caught:
        expand(made)
    assert "evaluate.every = 2: train.save_every = 3 does not keep the checkpoints; let it divide 2" in str(
        caught.value
    )
    assert "train.keep_every = 4" in str(caught.value)
    with pytest.raises(StudyError, match="train.save_every = 0 does not keep"):
        expand(evaluated(settings=TINY | {"train.steps": 9, "train.save_every": 0}))


# ---- what is refused


def test_everything_wrong_with_the_section_is_one_message():
    section = {
        "nun": 5,
        "guidance": [1.0, 1.0, "x"],
        "every": -1,
        "steps": 2.5,
        "features": "digit",
        "reference": "dat",
    }
    with pytest.raises(StudyError) as caught:
        recipe(evaluate=section)
    text = str(caught.value)
    for part in (
        "'nun' is no key of evaluate; did you mean num?",
        "evaluate.num: is missing; give the number of images",
        "evaluate.guidance = [1.0, 1.0, 'x']: must be a list of different numbers",
        "evaluate.every = -1: must lie in [0, inf)",
        "evaluate.steps = 2.5: must be a whole number",
        "evaluate.features = 'digit': is neither a file nor a name; did you mean digits?",
        "evaluate.reference = 'dat': is neither a file nor a name; did you mean data?",
    ):
        assert part in text
    assert len(caught.value.violations) == 7


@pytest.mark.parametrize("scales", [[], [True], [-1.0], [float("nan")], [[1]], [None]])
def test_scales_that_are_none(scales):
    with pytest.raises(StudyError, match="evaluate.guidance = .*must be a list of different numbers"):
        evaluated(SECTION | {"guidance": scales})


@pytest.mark.parametrize("value", [5, "500", [1], True])
def test_a_section_that_is_no_mapping(value):
    with pytest.raises(StudyError, match="evaluate = .*must be a mapping"):
        evaluated(value)


@pytest.mark.parametrize("name", ["features", "reference"])
def test_an_empty_name_is_no_path(name):
    with pytest.raises(StudyError, match=f"evaluate.{name} = '': is neither a file nor a name"):
        evaluated(SECTION | {name: ""})


def test_too_few_images_for_the_classifier():
    assert "too few for the covariance of the 112 features of the classifier digits; give 113" in refused({"num": 112})
    expand(evaluated({"num": 113}))


def refused(section, **changes) -> str:
    with pytest.raises(StudyError) as caught:
        expand(evaluated(section, **changes))
    return str(caught.value)


def test_the_widths_of_the_classifiers_are_those_that_are_checked():
    import torch

    seen = features.Classifier(8, 1, 10)(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert max(seen.pooled_ND.shape[1], seen.spatial_NP.flatten(1).shape[1]) == names.CLASSIFIER_FEATURES


def test_every_that_no_task_reaches():
    assert "evaluate.every = 6: the longest task has 6 steps" in refused({"num": 200, "every": 6})


def test_data_without_a_classifier_or_pixels():
    latents = resolve("promoe_s", overrides=["data.source=latents", "data.path=x"])
    said = "\n".join(problems_of(ImageEvaluation(num=200), latents))
    assert "evaluate.features: no classifier is made for 'latents'; give the file of the standard Inception" in said
    assert (
        "evaluate.autoencoder: is missing" in said and "evaluate.reference = 'data': the runs train on latents" in said
    )
    whole = ImageEvaluation(num=200, features="i.pth", autoencoder="vae", reference="r.npz")
    assert problems_of(whole, latents) == []


def test_files_are_found_from_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception.pth").touch()
    section = evaluated({"num": 200, "features": "inception.pth", "reference": "data"}).evaluate
    assert section.features == str(tmp_path / "inception.pth") and section.reference == "data"


# ---- which records are its own


ASKED = {"reference": "data", "split": "train", "features": "digits"}


def record(step, guidance, value=5.0, **changes):
    line = {"step": step, "guidance": guidance, "count": 200, "weights": "ema", "classes": "balanced", "only": None}
    line |= {"autoencoder": None, "sample": {"steps": 4}, "asked": ASKED}
    return line | {"figures": {"Fréchet distance (X)": value}} | changes


def write(run, records):
    run.mkdir(parents=True, exist_ok=True)
    (run / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + '{"step": 6, "gui')


def test_steps_without_all_their_figures_are_missing(tmp_path):
    job = evaluation_of(evaluated(), expand(evaluated())[0])
    assert job.missing_steps(tmp_path) == (2, 4, 6)
    write(tmp_path, [record(2, 1.0), record(2, 1.5), record(4, 1.0)])
    assert job.missing_steps(tmp_path) == (4, 6)
    words = job.words(tmp_path)
    assert words[words.index("--step") + 1 :] == ["4", "6"]
    write(tmp_path, [record(step, scale) for step in (2, 4, 6) for scale in (1.0, 1.5)])
    assert job.missing_steps(tmp_path) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 100},
        {"weights": "master"},
        {"only": [3]},
        {"classes": "random"},
        {"sample": {"steps": 5}},
        {"asked": ASKED | {"features": "other.pth"}},
        {"asked": ASKED | {"reference": "photos"}},
        {"asked": ASKED | {"split": "test"}},
        {"autoencoder": "vae"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_records_of_another_evaluation_do_not_count(changes, tmp_path):
    job = evaluation_of(evaluated(), expand(evaluated())[0])
    write(tmp_path, [record(step, scale, **changes) for step in (2, 4, 6) for scale in (1.0, 1.5)])
    assert job.missing_steps(tmp_path) == (2, 4, 6)


def test_a_record_of_earlier_versions_does_not_count(tmp_path):
    job = evaluation_of(evaluated(), expand(evaluated())[0])
    line = record(2, 1.0)
    del line["asked"]
    write(tmp_path, [line, {"step": 2, "guidance": 1.0, "count": 200, "figures": {}}])
    assert job.missing_steps(tmp_path) == (2, 4, 6)


def test_the_command_evaluates_what_the_recipe_says(tmp_path):
    """Read by the parser of the command itself."""
    import argparse

    from megapromoe.commands import evaluate

    job = evaluation_of(evaluated(weights="master"), expand(evaluated())[0])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    evaluate.arguments(parser)
    read = parser.parse_args(job.words(tmp_path / "run")[1:])
    assert read.run == tmp_path / "run" and read.num == 200 and read.weights == "master"
    assert [float(scale) for scale in read.guidance] == [1.0, 1.5] and read.step == [2, 4, 6]
    assert (read.steps, read.reference, read.split) == ("4", "data", "train")
    assert (read.features, read.autoencoder) == ("digits", None)


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
    section = text.partition("## Drawn images, mean over seeds")[2].partition("\n## ")[0]
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
    assert lines["dense"].get_color() == (0.0, 0.0, 0.0) and len({line.get_color() for line in lines.values()}) == 3
    assert len(figure.axes[1].collections) == 3 and figure.axes[0].get_ylabel() == "Fréchet distance (X), 200 images"


def test_one_step_makes_no_picture_of_curves(tmp_path):
    study = finished(tmp_path, evaluated({"num": 200, "steps": 4, "features": "digits", "guidance": [1.0]}))
    for task in study.tasks:
        write(study.run(task), [record(6, 1.0)])
    assert draw_evaluations(study, rows(study)) is None


# ---- why a promised file is not there


def told(command, study, capsys) -> list[str]:
    main(["study", command, str(study.folder)])
    return capsys.readouterr().out.splitlines()


def test_collect_says_why_a_file_is_not_written(tmp_path, capsys):
    study = finished(tmp_path / "s", recipe())
    lines = told("collect", study, capsys)
    for name in ("curves.csv", "evaluations.csv"):
        (line,) = [line for line in lines if line.startswith(f"{study.folder / name}: not written: ")]
        assert "no images were evaluated; let the recipe have a section `evaluate`" in line
    assert str(study.folder / "results.csv") in lines
    for made, reason in (
        (evaluated(), "no evaluation is done; `megapromoe study run"),
        (evaluated({"num": 200, "steps": 4, "features": "digits"}), "the recipe evaluates the last checkpoint alone"),
    ):
        other = finished(tmp_path / reason[:9], made)
        if "alone" in reason:
            for task in other.tasks:
                write(other.run(task), [record(6, 1.5)])
        lines = told("collect", other, capsys)
        assert any(line.startswith(f"{other.folder / 'curves.csv'}: not written: {reason}") for line in lines)


def test_a_file_of_an_earlier_collect_is_called_older(study, capsys):
    assert str(study.folder / "curves.csv") in told("collect", study, capsys)
    for task in study.tasks:
        (study.run(task) / "evaluation.jsonl").unlink()
    (line,) = [line for line in told("collect", study, capsys) if "curves.csv" in line]
    assert line.endswith("; the file that is there is older")


def test_plot_says_why_a_picture_is_not_drawn(tmp_path, capsys):
    study = finished(tmp_path / "s", recipe(axes={}))
    lines = told("plot", study, capsys)
    assert any(
        "loss_experts.png: not written: it needs tasks of two numbers of experts, and there is one" in x for x in lines
    )
    assert any("images.png: not written: no images were evaluated" in line for line in lines)
    for name in ("loss_compute", "routing", "cost"):
        assert str(study.folder / f"{name}.png") in lines
    for name in ("loss_experts", "images", "evaluations"):
        assert not (study.folder / f"{name}.png").exists()
