"""The section `evaluate` of a recipe: what it asks for, what is refused, which records count, and what they cost."""

import pytest
import yaml
from support.image_evaluations import REQUESTED, SECTION, evaluated, record, write
from support.small_studies import TINY, finished, recipe

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.evaluation import features, names
from megapromoe.planning.cost import flops_per_image
from megapromoe.studies.evaluations import evaluation_of
from megapromoe.studies.grid import expand
from megapromoe.studies.image_evaluation import ImageEvaluation, problems_of
from megapromoe.studies.recipe import StudyError, make_recipe, recipe_dict
from megapromoe.work_progress import duration

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
        assert train.steps == 6 and train.snapshot_every == 2 and train.keep_every == 0, "light ones of the averages"
    for task in expand(evaluated(weights="master")):
        train = task.config.train
        assert train.steps == 6 and train.save_every > 0 and train.keep_every > 0
        assert 2 % train.save_every == 0 and 2 % train.keep_every == 0
    for task in expand(evaluated({"num": 200})):
        train = task.config.train
        assert train.keep_every == train.snapshot_every == 0, "the last checkpoint is always kept"
    given = {"settings": TINY | {"train.steps": 6, "train.save_every": 1, "train.keep_every": 1}, "weights": "master"}
    assert {task.config.train.save_every for task in expand(evaluated(**given))} == {1}


def test_settings_that_remove_these_checkpoints_are_refused():
    with pytest.raises(StudyError, match="evaluate.every = 2: train.snapshot_every = 3 does not keep the checkpoints"):
        expand(evaluated(settings=TINY | {"train.steps": 9, "train.snapshot_every": 3}))
    given = {"train.steps": 9, "train.save_every": 3, "train.keep_every": 4}
    made = evaluated(settings=TINY | given, weights="master")
    with pytest.raises(StudyError) as caught:
        expand(made)
    assert "evaluate.every = 2: train.save_every = 3 does not keep the checkpoints; let it divide 2" in str(
        caught.value
    )
    assert "train.keep_every = 4" in str(caught.value)
    with pytest.raises(StudyError, match="train.save_every = 0 does not keep"):
        expand(evaluated(settings=TINY | {"train.steps": 9, "train.save_every": 0}, weights="master"))


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
        "'nun' is not a key of evaluate; did you mean num?",
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

    outputs = features.Classifier(8, 1, 10)(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert max(outputs.pooled_ND.shape[1], outputs.spatial_NP.flatten(1).shape[1]) == names.CLASSIFIER_FEATURES


def test_every_that_no_task_reaches():
    assert "evaluate.every = 6: the longest task has 6 steps" in refused({"num": 200, "every": 6})


def test_data_without_a_classifier_or_pixels():
    latents = resolve("promoe_s", overrides=["data.source=latents", "data.path=x"])
    messages = "\n".join(problems_of(ImageEvaluation(num=200), latents))
    assert (
        "evaluate.features: there is no classifier for 'latents'; give the file of the standard Inception" in messages
    )
    assert (
        "evaluate.autoencoder: is missing" in messages
        and "evaluate.reference = 'data': the runs train on latents" in messages
    )
    complete = ImageEvaluation(num=200, features="i.pth", autoencoder="vae", reference="r.npz")
    assert problems_of(complete, latents) == []


def test_files_are_found_from_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception.pth").touch()
    section = evaluated({"num": 200, "features": "inception.pth", "reference": "data"}).evaluate
    assert section.features == str(tmp_path / "inception.pth") and section.reference == "data"


# ---- which records are its own


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
        {"asked": REQUESTED | {"features": "other.pth"}},
        {"asked": REQUESTED | {"reference": "photos"}},
        {"asked": REQUESTED | {"split": "test"}},
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


def test_the_command_has_the_values_of_the_recipe(tmp_path):
    """Read by the parser of the command itself."""
    import argparse

    from megapromoe.commands import evaluate

    job = evaluation_of(evaluated(weights="master"), expand(evaluated())[0])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    evaluate.arguments(parser)
    read = parser.parse_args(job.words(tmp_path / "run")[1:])
    assert read.run == tmp_path / "run" and read.num_images == 200 and read.weights == "master"
    assert [float(scale) for scale in read.guidance] == [1.0, 1.5] and read.step == [2, 4, 6]
    assert (read.steps, read.reference, read.split) == ("4", "data", "train")
    assert (read.features, read.autoencoder) == ("digits", None)


def test_torchrun_passes_the_command_of_an_evaluation(tmp_path):
    """torchrun refuses flags that begin like several of its own, also behind the name of the program."""
    from torch.distributed.run import parse_args

    job = evaluation_of(evaluated(SECTION | {"autoencoder": "vae"}), expand(evaluated())[0])
    words = job.words(tmp_path)
    read = parse_args(["--standalone", "--nproc-per-node", "2", "-m", "megapromoe", *words])
    assert (read.training_script, read.training_script_args) == ("megapromoe", words)


def test_scales_with_many_digits_are_written_in_full(tmp_path):
    """The command line has every digit: else the figures would never be those that were asked for."""
    job = evaluation_of(evaluated(SECTION | {"guidance": [1 / 3]}), expand(evaluated())[0])
    words = job.words(tmp_path)
    assert float(words[words.index("--guidance") + 1]) == 1 / 3


def test_requested_evaluations_take_precedence_over_manual_ones(tmp_path):
    from megapromoe.studies.curves import figures

    study = finished(tmp_path, evaluated(seeds=[0], axes={}))
    (task,) = study.tasks
    write(study.run(task), [record(6, 1.0, 8.0), record(6, 1.0, 9.0), record(6, 1.0, 1.0, weights="master")])
    assert [row["value"] for row in figures(study, task)] == [9.0]


def test_a_plan_shows_the_cost_of_evaluations(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(evaluated(axes={}))))
    made = expand(evaluated(axes={}))
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", str(file), "--throughput", "1e6"]) == 0
    output = capsys.readouterr().out
    # 3 checkpoints, 200 images, 4 steps of the sampler; at scale 1 one pass, at 1.5 two.
    job = evaluation_of(evaluated(axes={}), made[0])
    flops = 2 * job.flops(3)
    assert job.flops(3) == 3 * 200 * 4 * 3 * flops_per_image(made[0].config.model).forward
    assert (
        f"evaluations: 2, one after each training; 2,400 images of 6 checkpoints, {flops:.3g} FLOPs of sampling"
        in output
    )
    assert f"estimate: {duration((sum(task.flops for task in made) + flops) / 1e6)} one task after another" in output


def test_models_of_texts_are_scored_on_scenes():
    texts = resolve("scenes", overrides=["data.source=latents", "data.path=x"])
    assert problems_of(ImageEvaluation(num=6, reference="scenes"), texts) == []
    (few,) = problems_of(ImageEvaluation(num=5, reference="scenes"), texts)
    assert few == "evaluate.num = 5: too few for 6 tasks; give more"
    (other,) = problems_of(ImageEvaluation(num=200), texts)
    assert "evaluate.reference = 'data': models of texts are scored on 'scenes'" in other
    unused = problems_of(ImageEvaluation(num=6, reference="scenes", features="digits", split="test"), texts)
    assert [text.partition(":")[0] for text in unused] == ["evaluate.features", "evaluate.split"]
    (classes,) = problems_of(ImageEvaluation(num=200, reference="scenes"), resolve("digits"))
    assert "is for models of texts" in classes
