"""Early stopping in a study: the rules, decisions that do not depend on restarts, and what tables then show."""

import itertools
import json
import math
import re

import pytest
import yaml
from support.small_studies import TINY, recipe, rows
from support.stand_ins import training_stand_in

from megapromoe.cli import main
from megapromoe.studies import runs
from megapromoe.studies.early_decisions import decide, loss_at, stopped_arms
from megapromoe.studies.early_stopping import StopEarly
from megapromoe.studies.recipe import StudyError, make_recipe, recipe_dict
from megapromoe.studies.status import job_state
from megapromoe.studies.study import open_study, plan

LONG = TINY | {"train.steps": 20, "train.save_every": 5}
VARIANTS = {name: {"settings": {"model.rcl_weight": 0.1 * i}} for i, name in enumerate("abcd")}


def early(section, **changes):
    return recipe(**({"settings": LONG, "axes": {}, "variants": VARIANTS, "stop_early": section} | changes))


def log(study, losses, upto=20, done=False):
    """Metrics of all tasks: `losses(task, step)` at each step; with `done`, the last step is saved."""
    for task in study.tasks:
        run = study.run(task)
        run.mkdir(parents=True, exist_ok=True)
        last = upto(task) if callable(upto) else upto
        lines = [{"step": s, "denoising_loss": losses(task, s), "images_per_second": 8.0} for s in range(1, last + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if done and last == 20:
            (run / "checkpoints" / "step-00000020").mkdir(parents=True)
            (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{}")


def rank(task):
    return "abcd".index(task.variant)


def of(*losses):
    return dict(enumerate(losses))


def test_halving_keeps_the_better_half_rounded_up_and_the_baseline():
    arms = {(name, ()): of(loss, loss) for name, loss in zip("abcde", (5.0, 3.0, 4.0, 1.0, 2.0), strict=True)}

    def names(keep, baseline=None):
        return "".join(name for name, _ in stopped_arms(arms, StopEarly((1,), keep), baseline))

    assert names(0.5) == "ac" and names(0.5, "a") == "c" and names(0.2) == "abce" and names(0.9) == ""
    arms["d", ()] = of(1.0, math.inf)
    assert names(0.5) == "ad", "a loss that is not a number is the worst"


def test_a_model_stops_if_its_interval_is_above_the_difference():
    """Of the best, `a`: 1.0 ± 0 and 1.0, 1.2, 1.4, whose interval begins at 1.2 - 4.3027 · 0.2 / sqrt(3) = 0.7032."""
    arms = {("a", ()): of(0.0, 10.0, 20.0), ("b", ()): of(1.0, 11.0, 21.0), ("c", ()): of(1.0, 11.2, 21.4)}
    for difference, stopped in ((0.5, "bc"), (0.7031, "bc"), (0.7033, "b"), (0.999, "b"), (1.0, "")):
        result = stopped_arms(arms, StopEarly((1,), difference=difference), None)
        assert "".join(name for name, _ in result) == stopped
    one_seed = {arm: of(losses[0]) for arm, losses in arms.items()}
    assert stopped_arms(one_seed, StopEarly((1,), difference=0.1), None) == []


def test_decisions_are_made_once_when_all_have_logged_the_step(tmp_path):
    study = plan(tmp_path, early({"steps": [10, 15], "keep": 0.5}))

    def worst_first(task, step):
        return 4.0 - rank(task) if step <= 10 else float(rank(task))

    log(study, worst_first, upto=lambda task: 9 if task.name == "d-seed1" else 20)
    assert decide(study) == [] and not (tmp_path / "decisions").exists()
    log(study, worst_first, upto=10)
    (decision,) = decide(study)
    assert [stopped["model"] for stopped in decision["stopped"]] == ["a", "b"] and decision["best"] == "d"
    assert decision["losses"]["a"] == {"0": 4.0, "1": 4.0}
    file = tmp_path / "decisions" / "step-00000010.json"
    before = file.read_bytes()
    # Later losses would give the opposite, and so would lines that are rewritten; a decision stays.
    log(study, worst_first, upto=lambda task: 14 if task.variant == "c" else 20)
    study = open_study(tmp_path)
    assert decide(study) == [] and file.read_bytes() == before
    log(study, worst_first)
    (second,) = decide(study)
    assert [s["model"] for s in second["stopped"]] == ["d"] and list(second["losses"]) == ["c", "d"]
    assert [study.stopped_early(task) for task in study.tasks] == [10, 10, None, 15] * 2
    assert [task.name for task in study.missing()] == ["c-seed0", "c-seed1"]
    # The same logs give the same bytes, whatever was logged beyond the step.
    written = {path.name: path.read_bytes() for path in (tmp_path / "decisions").iterdir()}
    for name in written:
        (tmp_path / "decisions" / name).unlink()
    assert len(decide(study)) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "decisions").iterdir()} == written


def test_the_loss_at_a_step_is_the_mean_of_its_last_tenth(tmp_path):
    study = plan(tmp_path, early({"steps": [10], "keep": 0.5}))
    task = study.tasks[0]
    log(study, lambda task, step: float(step))
    assert loss_at(study, task, 20) == 19.5 and loss_at(study, task, 10) == 10.0
    log(study, lambda task, step: float(step) if step % 4 == 0 else None)
    assert loss_at(study, task, 10) == math.inf and loss_at(study, task, 0) == math.inf


def test_stopped_models_are_shown_and_not_compared(tmp_path, capsys):
    study = plan(tmp_path, early({"steps": [10], "keep": 0.5}, baseline="a"))
    # All are trained to the end, as in jobs of an array that were faster than the decision.
    log(study, lambda task, step: 4.0 - rank(task), done=True)
    for task in study.tasks:
        study.loss_file(task).parent.mkdir(exist_ok=True)
        known = {"step": 20, "weights": "ema", "split": "train", "draws": 8192, "loss": 1.0, "standard_error": 0.1}
        study.loss_file(task).write_text(json.dumps(known))
    decide(study)
    assert main(["study", "collect", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "6 runs are done, 2 are missing: b-seed0 (stopped early" in text
    assert "| b | 10 | 3.000 | d | 1.000 |" in text and "| b | 2 |" not in text
    assert {job_state(study, task, 0.0).state for task in study.tasks if task.variant == "b"} == {"stopped early"}
    assert "by the comparison at step 10" in study.state(study.tasks[1])
    assert main(["study", "status", str(tmp_path)]) == 0
    assert "6 done, 2 stopped early" in capsys.readouterr().out
    assert len(study.finished()) == 6


def test_hours_of_runs_and_of_those_that_are_left(tmp_path, capsys):
    """Of runs without a clock: 20 steps of 16 images at 8 images per second are 40 s, on one rank."""
    study = plan(tmp_path, recipe(settings=LONG, axes={}, variants=dict(list(VARIANTS.items())[:2])))
    log(study, lambda task, step: 1.0, upto=lambda task: 5 if task.name == "b-seed1" else 20, done=True)
    for task in study.tasks:
        study.loss_file(task).parent.mkdir(exist_ok=True)
        known = {"step": 20, "weights": "ema", "split": "train", "draws": 8192, "loss": 1.0, "standard_error": 0.1}
        study.loss_file(task).write_text(json.dumps(known))
    done = [task for task in study.tasks if task.name != "b-seed1"]
    assert [row["gpu_hours"] for row in rows(type(study)(tmp_path, study.recipe, tuple(done)))] == [40 / 3600] * 3
    for task in done:
        file = study.run(task) / "metrics.jsonl"
        line = {"step": 20, "denoising_loss": 1.0, "elapsed_seconds": 7200.0, "flops_per_second": task.flops / 3600}
        file.write_text(file.read_text() + json.dumps(line) + "\n")
    (study.run(study.tasks[3]) / "checkpoints" / "step-00000005").mkdir(parents=True)
    (study.run(study.tasks[3]) / "checkpoints" / "step-00000005" / "manifest.json").write_text("{}")
    assert main(["study", "collect", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "The runs above took 6.00 GPU-hours" in text and "Left, at their speed: 0.750." in text
    assert "| b-seed1 | 5 of 20 | 0.750 |" in text, "three quarters of an hour: 15 of 20 steps"
    capsys.readouterr()


@pytest.mark.parametrize(
    "section, reason",
    [
        ({"steps": [10]}, "give one of keep (such as 0.5) and difference"),
        ({"steps": [10], "keep": 0.5, "difference": 0.1}, "give one of keep"),
        ({"steps": [15, 10], "keep": 0.5}, "must be ascending training steps"),
        ({"keep": 0.5}, "must be ascending training steps"),
        ({"steps": [20], "keep": 0.5}, "stop_early.steps = 20: must be below the 20 steps"),
        ({"steps": [10], "difference": -1}, "must be a loss, 0 or more"),
        ({"steps": [10], "keeps": 0.5}, "did you mean keep"),
    ],
)
def test_sections_that_cannot_be_followed_are_refused(section, reason, tmp_path):
    with pytest.raises(StudyError, match=re.escape(reason)):
        plan(tmp_path / "s", early(section))


def test_studies_that_cannot_be_compared_at_a_step_are_refused(tmp_path):
    settings = {key: value for key, value in LONG.items() if key != "train.steps"}
    with pytest.raises(StudyError, match="compares runs of one length, and the tasks have 20 to 40 steps"):
        made = early({"steps": [10], "keep": 0.5}, settings=settings, axes={"train.steps": [20, 40]})
        plan(tmp_path / "s", made)
    with pytest.raises(StudyError, match="nothing is logged before step 15"):
        plan(tmp_path / "s", early({"steps": [10], "keep": 0.5}, settings=LONG | {"train.log_every": 15}))
    with pytest.raises(StudyError, match="an interval needs two seeds"):
        early({"steps": [10], "difference": 0.1}, seeds=[0])
    made = early({"steps": [10], "difference": 0.0})
    assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(made), sort_keys=False)), saved=True) == made


# Trains a step in 10 ms from where it was saved; `a` is best, `d` worst. Stops after a step when it is asked to.
TRAINS = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
loss = 1.0 + c["model"]["rcl_weight"]
with open(run.parent.parent / "starts", "a") as file:
    file.write(f"{run.name} {saved}\\n")
run.mkdir(parents=True, exist_ok=True)
for step in range(saved + 1, c["train"]["steps"] + 1):
    time.sleep(0.01)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "denoising_loss": loss}) + "\\n")
    if asked:
        save(step)
        sys.exit(75)
save(c["train"]["steps"])
"""


@pytest.mark.full
def test_runs_pause_for_the_decision_and_only_the_better_half_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runs, "POLL", 0.02)
    settings = LONG | {"train.steps": 400}
    made = early({"steps": [10], "keep": 0.5}, settings=settings, launcher=training_stand_in(tmp_path, TRAINS))
    study = plan(tmp_path / "s", made)
    polls = itertools.count()
    codes = runs.run_tasks(study, study.tasks, 2, lambda: next(polls) > 12)  # the command is stopped in between
    assert 75 in codes.values()
    codes = runs.run_tasks(study, study.tasks, 2)
    assert set(codes.values()) == {0} and runs.exit_code(codes) == 0
    assert {task.variant for task in study.tasks if study.done(task)} == {"a", "b"}
    assert {task.variant for task in study.tasks if study.stopped_early(task) == 10} == {"c", "d"}
    paused = [study.steps_saved(task) for task in study.tasks if task.variant in "cd"]
    assert all(10 <= steps < 400 for steps in paused), "paused soon after the step, and not trained further"
    assert "early stopping at step 10: best a; stopped: c, d" in capfd.readouterr().err
    before = (study.folder / "starts").read_text()
    assert set(runs.run_tasks(study, study.tasks, 2).values()) == {0}
    assert (study.folder / "starts").read_text() == before, "nothing is left to do"


@pytest.mark.full
def test_a_run_that_fails_holds_up_the_decision_and_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runs, "POLL", 0.02)
    code = "if run.name == 'd-seed1': sys.exit(3)\n" + TRAINS
    made = early({"steps": [10], "keep": 0.5}, launcher=training_stand_in(tmp_path, code))
    study = plan(tmp_path / "s", made)
    codes = runs.run_tasks(study, study.tasks, 4)
    assert codes["d-seed1"] == 3 and study.decision(10) is None
    assert "early stopping at step 10 waits for d-seed1, which this command cannot train" in capfd.readouterr().err


@pytest.mark.full
def test_a_job_of_an_array_decides_and_ends_without_an_error(tmp_path, monkeypatch):
    """It trains one task and is not paused; the others have logged the step."""
    monkeypatch.setattr(runs, "POLL", 0.02)
    settings = LONG | {"train.steps": 4000}
    made = early({"steps": [10], "keep": 0.5}, settings=settings, launcher=training_stand_in(tmp_path, TRAINS))
    study = plan(tmp_path / "s", made)
    log(study, lambda task, step: 1.0 + 0.1 * rank(task), upto=lambda task: 0 if task.name == "d-seed1" else 10)
    (task,) = [task for task in study.tasks if task.name == "d-seed1"]
    assert runs.run_tasks(study, [task]) == {"d-seed1": 0}
    assert study.stopped_early(task) == 10 and 10 <= study.steps_saved(task) < 4000
