"""Scaling studies: what a recipe means, and that nothing is lost on the way. Their numbers: test_study_numbers.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.small_studies import TINY, compared, recipe

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.planning.cost import parameters
from megapromoe.studies.estimate import Speed, seconds
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import StudyError, find_recipe, make_recipe, read_recipe, recipe_dict, recipe_names
from megapromoe.studies.study import open_study, plan

RECIPES = [find_recipe(name) for name in recipe_names() if "/" not in name]  # others: test_paper_recipes.py


def test_expansion_is_every_combination_in_a_stable_order():
    tasks = expand(compared())
    assert [task.name for task in tasks] == [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("promoe-e2", "tc-e2", "dense", "promoe-e4", "tc-e4")
    ]
    assert [task.index for task in tasks] == list(range(10))
    for task in tasks:
        assert task.config.train.seed == task.config.data.seed == task.seed
        assert task.config.model.router == task.variant
        assert task.config.model.num_experts == task.point.get("model.num_experts", task.config.model.num_experts)
        assert task.images == 3 * 16


def test_axes_may_be_presets_and_steps():
    made = make_recipe(
        {
            "preset": "promoe_s",
            "axes": {"preset": ["promoe_s", "promoe_b"], "train.steps": [10, 20]},
            "variants": {"promoe": {}},
        }
    )
    sizes = {task.name: (task.config.model.hidden_size, task.config.train.steps) for task in expand(made)}
    assert sizes == {
        "promoe-promoe_s-steps10-seed0": (384, 10),
        "promoe-promoe_s-steps20-seed0": (384, 20),
        "promoe-promoe_b-steps10-seed0": (768, 10),
        "promoe-promoe_b-steps20-seed0": (768, 20),
    }


@pytest.mark.parametrize("made", [compared(), *map(read_recipe, RECIPES)], ids=["tiny", *(p.stem for p in RECIPES)])
def test_active_parameters_are_equal(made):
    tasks = expand(made)
    assert len({task.name for task in tasks}) == len(tasks)
    if made.active_parameters is None:
        return
    like = [f"{key}={value}" for key, value in (made.settings | made.active_parameters.like).items()]
    for task in tasks:
        target = parameters(resolve(task.point.get("preset", made.preset), overrides=like).model).active
        active = parameters(task.config.model).active
        assert active == pytest.approx(target, rel=min(made.active_parameters.tolerance, 0.01)), task.name


def test_the_study_of_scenes_differs_in_its_experts_alone():
    tasks = expand(read_recipe(find_recipe("scenes")))
    names = ("promoe", "promoe_without_unconditional", "tc", "dense")
    assert [task.name for task in tasks] == [f"{name}-seed{seed}" for seed in (0, 1, 2) for name in names]
    for task in tasks:
        model = task.config.model
        assert model.has_text and task.config.train.seed == task.config.data.seed == task.seed
        assert model.unconditional_experts == (task.variant == "promoe")
        assert bool(model.moe_blocks) == (task.variant != "dense")
        same = {"router": "promoe", "unconditional_expert": True, "balance_weight": 0.0, "mlp_ratio": 4.0}
        if task.seed == 0:
            assert replace(model, **same) == tasks[0].config.model
            assert replace(task.config, model=tasks[0].config.model) == tasks[0].config


def test_a_solved_ratio_is_the_nearest():
    dense = next(task.config for task in expand(compared()) if task.variant == "dense")
    target = parameters(resolve("digits", overrides=[*settings(TINY), "model.num_experts=2"]).model).active
    assert dense.model.mlp_width % 4 == 0
    assert dense.model.mlp_ratio != 1.0, "as written it is far off"

    def off(width):
        ratio = f"model.mlp_ratio={width / 32}"
        return abs(
            parameters(resolve("digits", overrides=[*settings(TINY), "model.router=dense", ratio]).model).active
            - target
        )

    assert off(dense.model.mlp_width) < min(off(dense.model.mlp_width - 4), off(dense.model.mlp_width + 4))


def settings(values: dict) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_survive_writing(path):
    made = read_recipe(path)
    written = make_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(made), sort_keys=False)))
    assert written == made and [t.name for t in expand(written)] == [t.name for t in expand(made)]


def test_a_written_study_has_numbers_and_those_with_text_are_still_read(tmp_path, capsys):
    texts = {"train.steps": "300", "train.lr": "1e-3", "model.learn_sigma": "true", "data.source": "digits"}
    call = ["study", "plan", str(tmp_path / "s"), "--preset", "digits", "--experts", "2", "4", "--seeds", "0"]
    call += ["--routers", "promoe", "tc", *settings(texts)]
    assert main(call) == 0
    file = tmp_path / "s" / "study.yaml"
    content = yaml.safe_load(file.read_text())
    typed = {"train.steps": 300, "train.lr": 0.001, "model.learn_sigma": True, "data.source": "digits"}
    assert {key: content["settings"][key] for key in texts} == typed
    tasks = [(task.name, task.config) for task in open_study(tmp_path / "s").tasks]
    file.write_text(yaml.safe_dump(content | {"settings": content["settings"] | texts}, sort_keys=False))  # as 0.1 did
    assert [(task.name, task.config) for task in open_study(tmp_path / "s").tasks] == tasks
    assert main(call) == 0, "the same study"
    capsys.readouterr()


def test_all_problems_of_a_recipe_are_reported_together():
    with pytest.raises(StudyError) as caught:
        make_recipe(
            {
                "presets": "digits",
                "axes": {"model.num_experts": [4, 4]},
                "seeds": [-1],
                "variants": {"a/b": {"setings": {}}},
                "active_parameters": {"tolerance": 0},
                "ranks": 4,
                "weights": "mean",
            }
        )
    message = str(caught.value)
    for expected in (
        "did you mean preset?",
        "preset: is missing",
        "model.num_experts",
        "seeds",
        "a/b",
        "did you mean settings?",
    ):
        assert expected in message
    assert "weights = 'mean': must be ema or master" in message
    assert "tolerance" in message and "needs a launcher" in message


def test_configs_that_cannot_run_are_reported_with_their_tasks():
    with pytest.raises(
        StudyError, match=r"model.heads = 5.*\[promoe-e2-seed0, promoe-e4-seed0, .* and 1 more\]"
    ) as caught:
        expand(recipe(settings=TINY | {"model.heads": 5}))
    assert len(caught.value.violations) == 1
    with pytest.raises(StudyError, match="'baseline' = 'x'|baseline = 'x'"):
        expand(recipe(baseline="x"))
    with pytest.raises(StudyError, match="is an axis"):
        expand(recipe(variants={"promoe": {"settings": {"model.num_experts": 3}}}))


def test_values_that_give_equal_file_names_are_refused():
    """The second would never be trained."""
    made = recipe(preset="fashion", axes={"data.path": ["a/b", "a_b", "c"]}, seeds=[0])
    with pytest.raises(StudyError, match="data.path = 'a/b' and 'a_b': both are named promoe-patha_b-seed0 in files"):
        expand(made)


def test_active_parameters_that_cannot_be_equal_are_refused():
    variants = {
        "dense": {"settings": {"model.router": "dense", "model.mlp_ratio": 1.0}, "without": ["model.num_experts"]}
    }
    with pytest.raises(StudyError, match=r"dense has .* off the required .*name a ratio to solve"):
        expand(recipe(variants=variants, active_parameters={"like": {}}))
    variants["dense"]["match"] = "model.expert_ratio"
    with pytest.raises(StudyError, match="does not change the active parameters"):
        expand(recipe(variants=variants, active_parameters={"like": {}}))


def test_plan_refuses_another_study_and_strangers(tmp_path):
    study = plan(tmp_path / "s", recipe())
    assert [task.name for task in open_study(tmp_path / "s").tasks] == [task.name for task in study.tasks]
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.yaml")}
    plan(tmp_path / "s", recipe())
    assert before == {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.yaml")}
    for other in (recipe(seeds=[3]), recipe(seeds=[1, 0])):  # the order is that of the tasks
        with pytest.raises(StudyError, match="another study"):
            plan(tmp_path / "s", other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(StudyError, match="not empty"):
        plan(tmp_path / "full", recipe())
    with pytest.raises(StudyError, match="no study.yaml"):
        open_study(tmp_path / "nowhere")


def test_a_study_of_an_earlier_version_keeps_its_warm_up(tmp_path):
    """It planned short trainings with the preset's whole warm-up."""
    short = replace(recipe(), settings={k: v for k, v in recipe().settings.items() if k != "train.warmup"})
    short.settings["train.steps"] = 40
    study = plan(tmp_path, short)
    assert {task.config.train.warmup for task in study.tasks} == {4}
    for task in study.tasks:
        study.config(task).write_text(study.config(task).read_text().replace("warmup: 4", "warmup: 30"))
    assert {task.config.train.warmup for task in open_study(tmp_path).tasks} == {30}
    file = study.config(study.tasks[1])
    file.write_text(file.read_text().replace("warmup: 30", "warmup: 29"))
    with pytest.raises(StudyError, match=f"{study.tasks[1].name}.yaml: differs from what this version"):
        open_study(tmp_path)


def test_a_study_whose_configs_differ_from_its_recipe_is_refused(tmp_path):
    study = plan(tmp_path, recipe())
    file = study.config(study.tasks[1])
    file.write_text(file.read_text().replace("lr: 0.004", "lr: 0.003"))
    with pytest.raises(StudyError, match=f"{study.tasks[1].name}.yaml: differs from what this version"):
        open_study(tmp_path)


def test_a_checkpoint_that_is_being_written_does_not_count(tmp_path):
    study = plan(tmp_path, recipe())
    for name in ("step-00000002", "step-00000003.writing"):
        folder = study.run(study.tasks[0]) / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert study.steps_saved(study.tasks[0]) == 2 and not study.done(study.tasks[0])


def test_hours_add_up():
    study = plan_in_memory(recipe())
    speeds = {"promoe": Speed(1e6, start=7.0)}
    assert seconds(study, speeds) == pytest.approx(4 * 7 + sum(task.flops for task in study.tasks) / 1e6)


def plan_in_memory(made):
    from megapromoe.studies.study import Study

    return Study(Path("/nowhere"), made, expand(made))


def planned(folder, capsys, *words: str, code: int = 0) -> str:
    """What `study plan` says of ProMoE, token choice and dense."""
    routers = [] if "--routers" in words else ["--routers", "promoe", "tc", "dense"]
    assert main(["study", "plan", str(folder), "--preset", "promoe_b", "--seeds", "0", *routers, *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_the_documented_study_with_dense_among_the_models_is_planned(tmp_path, capsys):
    words = ["--experts", "4", "64", "--ranks", "8", "--launcher", "torchrun --standalone --nproc-per-node 8"]
    planned(tmp_path, capsys, *words, "parallel.ep=4")
    tasks = {task.name: task.config.parallel.ep for task in open_study(tmp_path).tasks}
    assert tasks == {f"{name}-seed0": 1 if name == "dense" else 4 for name in
                     ("promoe-e4", "tc-e4", "dense", "promoe-e64", "tc-e64")}  # fmt: skip
    dense = yaml.safe_load((tmp_path / "study.yaml").read_text())["variants"]["dense"]
    assert dense["settings"] == {"model.router": "dense", "parallel.ep": 1}, "it can be read in the recipe"


@pytest.mark.parametrize(
    "routers, setting, expected",
    [
        ("promoe dense", "parallel.recompute=moe", {"promoe": "moe", "dense": "none"}),
        ("promoe dense", "model.capacity_factor=1.5", {"promoe": 1.5, "dense": 0.0}),
        ("tc ec", "model.capacity_factor=1.5", {"tc": 1.5, "ec": 0.0}),
        ("promoe kmeans", "model.batch_scope=rank", {"promoe": "rank", "kmeans": "global"}),
        ("promoe kmeans", "model.balance_weight=0.1", {"promoe": 0.1, "kmeans": 0.0}),
        ("dense tc", "parallel.ep=4", {"dense": 1, "tc": 4}),
        ("conditional tc", "parallel.ep=4", {"conditional": 1, "tc": 4}),
        ("promoe conditional", "model.unconditional_expert=false", {"promoe": False, "conditional": True}),
    ],
)
def test_a_setting_that_a_model_cannot_take_keeps_the_value_of_its_preset(routers, setting, expected, tmp_path, capsys):
    planned(tmp_path, capsys, "--routers", *routers.split(), "--ranks", "8", "--launcher", "srun python", setting)
    section, _, name = setting.partition("=")[0].partition(".")
    values = {task.variant: getattr(getattr(task.config, section), name) for task in open_study(tmp_path).tasks}
    assert values == expected


def test_a_preset_whose_own_router_cannot_take_a_setting_is_no_hindrance(tmp_path, capsys):
    words = ["--routers", "dense", "tc", "--ranks", "4", "--launcher", "srun python"]
    assert main(["study", "plan", str(tmp_path), "--preset", "dit_b", "--seeds", "0", *words, "parallel.ep=4"]) == 0
    assert {task.variant: task.config.parallel.ep for task in open_study(tmp_path).tasks} == {"dense": 1, "tc": 4}


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--routers", "dense", "parallel.ep=4"], "parallel.ep"),
        (["train.lr=-1"], "train.lr = -1.0: must lie in"),
        (["model.hidden=3"], "did you mean hidden_size"),
        (["--routers", "promoe", "kmeans", "train.lr=-1"], "train.lr = -1.0: must lie in"),
    ],
)
def test_a_setting_that_no_model_can_take_is_still_refused(words, reason, tmp_path, capsys):
    assert reason in planned(tmp_path / "s", capsys, *words, code=2)
    assert not (tmp_path / "s").exists()


def test_a_recipe_with_such_a_setting_is_refused_with_the_remedy():
    made = recipe(
        settings=TINY | {"parallel.ep": 2},
        variants={
            "promoe": {},
            "dense": {"settings": {"model.router": "dense"}, "without": ["model.num_experts"]},
        },
        ranks=2,
        launcher=["srun", "python"],
    )
    with pytest.raises(StudyError, match=r"parallel.ep = 2.*\[dense-seed0.*; other tasks accept it: set another value"):
        expand(made)
    content = recipe_dict(made)
    content["variants"]["dense"]["settings"]["parallel.ep"] = 1
    assert {task.variant: task.config.parallel.ep for task in expand(make_recipe(content))} == {"promoe": 2, "dense": 1}
