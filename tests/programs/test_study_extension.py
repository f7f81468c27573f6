"""Tasks that are added to a study: what stays as it was, what is refused, and a kill at any moment."""

import os
import signal
from dataclasses import replace

import pytest
import yaml
from support.image_evaluations import SECTION
from support.small_studies import TINY, recipe
from support.stand_ins import FOUR, evaluating_study, starts

from megapromoe import io
from megapromoe.cli import main
from megapromoe.studies import extension, runs
from megapromoe.studies.extension import extend
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import StudyError, make_recipe, recipe_dict
from megapromoe.studies.study import open_study, plan
from megapromoe.studies.task_locks import lock_path

TC = {"settings": {"model.router": "tc", "model.shared_expert": False, "model.unconditional_expert": False}}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize(
    "changes, added",
    [
        ({"seeds": [7, 0]}, ["promoe-e2-seed7", "promoe-e4-seed7"]),
        ({"variants": {"tc": TC, "promoe": {}}, "axes": {"model.num_experts": [2, 3, 4]}},
         ["tc-e2-seed0", "tc-e3-seed0", "promoe-e3-seed0", "tc-e4-seed0"]),
        ({"weights": "master", "baseline": "promoe"}, []),
    ],
)  # fmt: skip
def test_added_tasks_follow_those_that_were_planned(changes, added, tmp_path):
    old = plan(tmp_path / "s", recipe(seeds=[0]))
    before = files(old.folder)
    made = extend(old.folder, recipe(**{"seeds": [0]} | changes))
    assert [task.name for task in made.added] == added and set(made.changed) == set(changes)
    study = open_study(old.folder)
    assert study.tasks[: len(old.tasks)] == old.tasks and study.tasks == made.study.tasks
    assert [task.index for task in study.tasks] == list(range(len(study.tasks)))
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "study.yaml")
    assert extend(old.folder, recipe(**{"seeds": [0]} | changes)).changed == (), "repeated, it adds nothing"
    again = extend(old.folder, recipe(**changes | {"seeds": [*changes.get("seeds", [0]), 9]}))
    assert open_study(old.folder).tasks[: len(study.tasks)] == study.tasks and again.added
    copied = yaml.safe_load((old.folder / "study.yaml").read_text())
    assert "task_order" in copied and make_recipe(copied) == again.study.recipe, "its copy is a recipe"


def test_every_difference_of_a_planned_task_is_refused(tmp_path):
    study = plan(tmp_path / "s", recipe())
    before = files(study.folder)
    changed = recipe(settings=TINY | {"train.lr": 0.5, "model.depth": 3}, axes={"model.num_experts": [2, 8]}, seeds=[0])
    with pytest.raises(StudyError) as caught:
        extend(study.folder, changed)
    first, *others = caught.value.violations
    others[-1], _, remedy = others[-1].partition(". An extension adds")
    names = "promoe-e4-seed0, promoe-e2-seed1, promoe-e4-seed1"
    assert first == f"{study.folder / 'study.yaml'}: is another study; the recipe has no longer the tasks {names}"
    expected = ["train.lr: 0.004 -> 0.5 [promoe-e2-seed0]", "model.depth: 2 -> 3 [promoe-e2-seed0]"]
    assert sorted(others) == sorted(expected)
    assert "plan the recipe in another folder" in remedy
    with pytest.raises(StudyError, match="in another order; put new seeds, values and variants behind the others"):
        extend(study.folder, recipe(seeds=[1, 0, 2]))
    with pytest.raises(StudyError, match="evaluate.every needs checkpoints that planned tasks do not keep"):
        extend(study.folder, recipe(settings=FOUR, evaluate=SECTION | {"every": 2}))
    assert files(study.folder) == before


def test_a_warm_up_of_an_earlier_version_is_not_mixed_with_that_of_today(tmp_path):
    """Seeds added under other rules would not be comparable; with the setting in the recipe they are added."""
    made = recipe(seeds=[0], axes={})
    study = plan(tmp_path, made)
    for task in study.tasks:
        content = yaml.safe_load(study.config(task).read_text())
        del content["train"]["ema_warmup"]
        study.config(task).write_text(yaml.safe_dump(content))
    with pytest.raises(StudyError, match="train.ema_warmup: false -> true"):
        extend(tmp_path, replace(made, seeds=(0, 1)))
    settings = {**made.settings, "train.ema_warmup": False}
    assert len(extend(tmp_path, replace(made, settings=settings, seeds=(0, 1))).added) == 1
    assert not any(task.config.train.ema_warmup for task in open_study(tmp_path).tasks)


def test_a_rule_by_which_models_were_stopped_early_stays(tmp_path):
    section = {"steps": [2], "keep": 0.5}
    variants = {"promoe": {}, "tc": TC}
    study = plan(tmp_path, recipe(axes={}, seeds=[0], variants=variants, stop_early=section))
    assert extend(
        tmp_path, recipe(axes={}, seeds=[0], variants=variants, stop_early={"steps": [1], "keep": 0.5})
    ).changed == ("stop_early",)
    extend(tmp_path, recipe(axes={}, seeds=[0], variants=variants, stop_early=section))
    (tmp_path / "decisions").mkdir()
    with pytest.raises(StudyError, match="stop_early: differs, and models were stopped by the present section"):
        extend(tmp_path, recipe(axes={}, seeds=[0], variants=variants))
    larger = recipe(axes={}, variants=variants, seeds=[0, 1], stop_early=section)
    assert len(extend(tmp_path, larger).added) == 2 and open_study(tmp_path).tasks[:2] == study.tasks


def test_a_study_with_a_former_name_in_its_folders_keeps_them(tmp_path):
    made = recipe(axes={"train.max_grad_norm": [0.5, 1.0]}, seeds=[0])
    content = recipe_dict(made)
    content["axes"] = {"train.clip": [0.5, 1.0]}
    former = make_recipe(content, saved=True)
    assert former.former_axes
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    from megapromoe.config.resolve import to_yaml

    (tmp_path / "s" / "tasks").mkdir()
    old = expand(former)
    for task in old:
        (tmp_path / "s" / "tasks" / f"{task.name}.yaml").write_text(to_yaml(task.config))
    added = extend(tmp_path / "s", replace(made, seeds=(0, 1))).added
    assert [task.name for task in added] == ["promoe-clip0.5-seed1", "promoe-clip1.0-seed1"]
    assert open_study(tmp_path / "s").tasks[:2] == old


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after it"])
def test_a_killed_extension_leaves_the_old_study_or_the_new_one(after, tmp_path, monkeypatch):
    """Killed at each of its renames, the last of which replaces study.yaml."""
    study = plan(tmp_path / "s", recipe(axes={}, seeds=[0]))
    larger = recipe(axes={}, seeds=[0, 1])
    old, replace_file = study.tasks, os.replace
    for kill_at in range(2):
        child = os.fork()
        if child == 0:
            calls = []

            def killed(source, target, calls=calls, kill_at=kill_at):
                calls.append(target)
                if after and len(calls) == kill_at + 1:
                    replace_file(source, target)
                if len(calls) == kill_at + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace_file(source, target)

            io.os.replace = killed
            try:
                extend(study.folder, larger)
            finally:
                os._exit(1)  # not killed: there were fewer renames
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        complete = after and kill_at == 1
        assert open_study(study.folder).tasks == (expand(larger) if complete else old)
    assert len(extend(study.folder, larger).added) == (0 if after else 1)
    assert open_study(study.folder).tasks == expand(larger)


def test_two_commands_do_not_extend_one_study_at_the_same_time(tmp_path):
    study = plan(tmp_path / "s", recipe(axes={}, seeds=[0]))
    with lock_path(study.folder / "locks" / "study.lock") as lock:
        assert lock is not None
        with pytest.raises(StudyError, match="another command is changing this study; repeat the command"):
            extend(study.folder, recipe(axes={}, seeds=[0, 1]))
    assert extend(study.folder, recipe(axes={}, seeds=[0, 1])).added


def test_an_added_seed_trains_alone_and_an_added_evaluation_evaluates_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)
    study = evaluating_study(tmp_path, seeds=[0], evaluate=None)
    runs.run_tasks(study, study.jobs())
    content = recipe_dict(study.recipe) | {"seeds": [0, 1]}
    content["evaluate"] = {"num": 200, "steps": 4, "features": "digits"}  # of the last checkpoints, which all keep
    file = tmp_path / "larger.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["study", "plan", str(study.folder), "--recipe", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "extended: 1 tasks as before, 1 new; changed in study.yaml: seeds, evaluate" in printed
    assert "new tasks, 1 to 1: promoe-seed1" in printed
    study = open_study(study.folder)
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}
    assert starts(study) == ["train promoe-seed0", "evaluate promoe-seed0", "train promoe-seed1",
                             "evaluate promoe-seed1"]  # fmt: skip
    assert extension.differences(study.tasks[0].config, study.tasks[0].config) == []
