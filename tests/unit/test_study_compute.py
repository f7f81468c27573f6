"""Grids of equal compute: budgets of training FLOPs, steps that are solved for, and what is refused."""

import re

import pytest
import yaml
from support.small_studies import TINY, recipe

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import StudyError, find_recipe, make_recipe, read_recipe, recipe_dict

SETTINGS = {key: value for key, value in TINY.items() if key != "train.steps"}
TC = {"model.router": "tc", "model.shared_expert": False, "model.unconditional_expert": False}
VARIANTS = {
    "promoe": {},
    "tc": {"settings": TC, "match": "model.expert_ratio"},
    "dense": {
        "settings": {"model.router": "dense", "model.mlp_ratio": 1.0},
        "match": "model.mlp_ratio",
        "without": ["model.num_experts"],
    },
}


def grid(**changes):
    """Without active parameters to match, unless they are given."""
    unused = ("match", *(() if "axes" not in changes else ("without",)))
    plain = {name: {k: v for k, v in variant.items() if k not in unused} for name, variant in VARIANTS.items()}
    variants = VARIANTS if "active_parameters" in changes else plain
    return recipe(**({"settings": SETTINGS, "variants": variants, "seeds": [0]} | changes))


def flops(task):
    """Of the whole training, from the cost of an image."""
    config = task.config
    return flops_per_image(config.model).training * config.train.global_batch * config.train.steps


def test_budgets_as_an_axis_are_reached_by_models_of_different_cost():
    """Text such as 1e11 is a number too: YAML reads it as text."""
    equal = {"like": {"model.num_experts": 2}, "tolerance": 0.01, "multiple": 4}
    made = grid(
        axes={"compute.flops": ["1e11", 4.0e10], "model.hidden_size": [32, 64]},
        variants={name: {k: v for k, v in variant.items() if k != "without"} for name, variant in VARIANTS.items()},
        active_parameters=equal,
    )
    tasks = expand(made)
    assert len(tasks) == 12 and tasks[0].name == "promoe-flops1e11-d32-seed0"
    for task in tasks:
        budget = task.point["compute.flops"]
        assert budget in (1e11, 4e10) and flops(task) == pytest.approx(budget, rel=0.005)
        of_step = flops(task) / task.config.train.steps
        assert abs(flops(task) - budget) <= of_step / 2, "the nearest number of steps"
    active = {
        d: {parameters(t.config.model).active for t in tasks if t.point["model.hidden_size"] == d} for d in (32, 64)
    }
    assert all(max(counts) < 1.02 * min(counts) for counts in active.values()), "widths are solved for as well"
    steps = {task.name: task.config.train.steps for task in tasks}
    assert steps["promoe-flops1e11-d32-seed0"] > 2 * steps["promoe-flops1e11-d64-seed0"]
    written = make_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(made), sort_keys=False)), saved=True)
    assert written == made and [t.config for t in expand(written)] == [t.config for t in tasks]


def test_one_budget_is_a_number_or_that_of_a_training():
    base = resolve("digits", overrides=[f"{k}={v}" for k, v in (SETTINGS | {"train.steps": 400}).items()])
    budget = flops_per_image(base.model).training * 16 * 400
    for compute in ({"like": {"train.steps": 400}}, {"flops": float(budget)}):
        tasks = expand(grid(compute=compute))
        assert all(flops(task) == pytest.approx(budget, rel=0.005) for task in tasks)
        assert len({task.config.train.steps for task in tasks}) > 1


def test_a_budget_of_too_few_steps_is_refused_and_the_remedy_works():
    """Steps are whole: with n of them the nearest number is off by up to 1 / 2n, which is 0.5 % at a hundred."""
    of_step = flops(expand(recipe(settings=TINY, seeds=[0], axes={}))[0]) / 3
    with pytest.raises(StudyError, match="compute: promoe takes .* FLOPs a step") as caught:
        expand(grid(axes={}, variants={"promoe": {}}, compute={"flops": 3.4 * of_step}))
    (line,) = caught.value.violations
    assert "3 steps, the nearest number, is -11.8% off the budget" in line and "other tasks" not in line
    enough = float(re.search(r"give a budget of (\S+) or more", line)[1])
    assert enough == pytest.approx(100 * of_step, rel=0.01)
    for factor in (1, 1.004, 1.0049, 1.013, 1.2):
        (task,) = expand(grid(axes={}, variants={"promoe": {}}, compute={"flops": factor * enough}))
        assert abs(flops(task) / (factor * enough) - 1) <= 0.005
    (task,) = expand(grid(axes={}, variants={"promoe": {}}, compute={"flops": 3.4 * of_step, "tolerance": 0.12}))
    assert task.config.train.steps == 3


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"compute": {}}, "compute: no budget is given; give one of"),
        ({"compute": {"flops": 1e11, "like": {"train.steps": 3}}}, "compute.flops and compute.like are given"),
        ({"compute": {"flops": 1e11}, "axes": {"compute.flops": [1e11]}}, "axes.compute.flops and compute.flops are"),
        ({"compute": {"flops": 1e11}, "settings": TINY}, "settings: train.steps is solved for"),
        ({"compute": {"flops": 1e11}, "axes": {"train.steps": [3, 4]}}, "axes: train.steps is solved for"),
        ({"compute": {"flops": -1}}, "must be a number of FLOPs above 0, such as 1.0e+15"),
        ({"compute": {"flops": "many"}}, "compute.flops = 'many': must be a number of FLOPs"),
        ({"compute": {"flop": 1e11}}, "did you mean flops"),
        ({"axes": {"compute.flops": [True]}}, "axes.compute.flops = True: must be"),
        (
            {"axes": {"compute.flops": [1e11, 2e11]}, "variants": {"promoe": {"without": ["compute.flops"]}}},
            "every task has a budget",
        ),
    ],
)
def test_contradictions_are_refused(changes, reason):
    with pytest.raises(StudyError, match=re.escape(reason)):
        expand(grid(**changes))


def test_the_plan_states_the_rounding(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(grid(axes={}, compute={"flops": 1e11}))))
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", str(file)]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("equal compute: "))
    off = float(re.search(r"within ([\d.]+)%", line)[1])
    assert 0 <= off <= 0.5
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", str(file)]) == 0, "the same study"
    assert "compute" not in recipe_dict(read_recipe(find_recipe("digits"))), "studies of before are as they were"
