"""The recipes of the paper's tables: what they train, what they cite, and the same models at a small scale."""

import re
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.small_studies import finished, recipe

from megapromoe.cli import main
from megapromoe.planning.cost import parameters
from megapromoe.planning.machines import MACHINES
from megapromoe.studies.gpu_hours import arm_lines, arms
from megapromoe.studies.grid import expand
from megapromoe.studies.published_tables import published_sections, size_lines
from megapromoe.studies.recipe import (
    EqualCompute,
    StudyError,
    find_recipe,
    make_recipe,
    read_recipe,
    recipe_dict,
    recipe_names,
)
from megapromoe.studies.recipe_changes import changed
from megapromoe.studies.scales import scaled
from megapromoe.studies.study import Study, open_study

PAPER = {name: read_recipe(find_recipe(name)) for name in recipe_names() if name.startswith("paper/")}
TABLES = range(1, 19)
# Tables whose models have different active parameters, as published: by the number of experts of a token.
UNEQUAL = {"paper/t13"}
# The capacity predictor of DiffMoE, which the paper does not count.
PREDICTOR = 0.031


def tasks_of(made):
    return expand(replace(made, seeds=(0,)))


def figure(name, variant, figure, guidance, step=0, **at):
    """A published value of the recipe paper/NAME; `at` has values of axes, by the last part of their names."""
    entries = next(v.published for v in PAPER[f"paper/{name}"].variants if v.name == variant)
    points = ({key.rpartition(".")[2]: value for key, value in entry.at.items()} for entry in entries)
    values = [
        entry.figures[figure]
        for entry, point in zip(entries, points, strict=True)
        if entry.guidance == guidance and entry.step == step and point == at and figure in entry.figures
    ]
    assert len(values) == 1
    return values[0]


def test_every_table_that_trains_models_has_a_recipe(capsys):
    assert main(["study", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for number in TABLES:
        assert any(re.match(rf"paper/t{number} +table {number}\b", line) for line in lines), number
    others = ["digits", "digits_compute", "fashion", "fashion_routers", "scenes"]
    assert [name for name in recipe_names() if "/" not in name] == others
    assert list(PAPER)[2:4] == ["paper/t1", "paper/t2"], "in the order of their numbers"
    assert len(lines) == len(recipe_names()) + 1 and all(line.partition(" ")[2].strip() for line in lines)


@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_plans_with_the_settings_that_the_paper_states(name):
    made = PAPER[name]
    tasks = tasks_of(made)
    assert made.seeds == (0, 1, 2), "the noise of one run is larger than most differences"
    assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(made), sort_keys=False))) == made
    active = defaultdict(dict)
    for task in tasks:
        train, model = task.config.train, task.config.model
        text = model.has_text
        assert (train.lr, train.global_batch, train.weight_decay) == (1e-4, *((384, 0.02) if text else (256, 0.0)))
        assert train.ema_decay == 0.9999 and not train.ema_warmup and train.warmup == 0
        assert text or task.config.data.flip
        count = parameters(model).active
        active[tuple(task.point.items())][task.variant] = count / (1 + PREDICTOR * (model.router == "diffmoe"))
    for counts in active.values() if name not in UNEQUAL else ():
        assert max(counts.values()) < 1.01 * min(counts.values()), counts
    if made.evaluate is not None:
        assert made.evaluate.num == (10_000 if name == "paper/t16" else 50_000) and made.evaluate.steps == 250


@pytest.mark.parametrize("name", PAPER)
def test_every_published_figure_has_its_table_and_a_place_in_the_study(name):
    made = PAPER[name]
    entries = [entry for variant in made.variants for entry in variant.published]
    if name.startswith("paper/fig"):
        assert not entries, "figures print no numbers"
        return
    steps = {task.config.train.steps for task in tasks_of(made)}
    for entry in entries:
        assert entry.source.startswith(f"table {name.removeprefix('paper/t')}, ")
        if made.evaluate is not None and entry.guidance is not None:
            assert entry.guidance in made.evaluate.guidance and set(entry.figures) <= {"FID", "Inception score"}
            assert not entry.step or entry.step in steps or entry.step == made.evaluate.every
    points = {(task.variant, str(task.point)) for task in tasks_of(made)}
    assert points == {(v.name, str(e.at)) for v in made.variants for e in v.published}, "every model has figures"


def test_the_published_figures_have_the_differences_that_the_text_of_the_paper_states():
    """Percentages of sections 5.2, 5.4 and C.5, which a slip in a table of the recipes would change."""

    def changes(table, models, scale, stated, **at):
        for name, percent in stated.items():
            ours, other = (figure(table, model, name, scale, **at) for model in models)
            assert 100 * (ours / other - 1) == pytest.approx(percent, abs=0.06), (table, name)

    changes("t3", ("promoe", "dense"), 1.0, {"FID": -24.8, "Inception score": 19.7}, preset="promoe_l")
    changes("t3", ("promoe", "dense"), 1.0, {"FID": -29.4}, preset="promoe_xl")
    changes("t3", ("promoe", "dense"), 1.5, {"FID": -29.2}, preset="promoe_b")
    changes("t3", ("promoe", "dense"), 1.5, {"FID": -19.8}, preset="promoe_xl")
    changes("t5", ("promoe", "diffmoe"), 1.0, {"FID": -19.7, "Inception score": 15.2})
    changes("t5", ("promoe", "diffmoe"), 1.5, {"FID": -20.5, "Inception score": 14.8})
    changes("t7", ("prototypes_rcl", "prototypes"), 1.0, {"FID": -10.6, "Inception score": 9.8})
    for other, size, percent in (
        ("dense", "l", -21),
        ("diffmoe", "l", -10),
        ("dense", "xl", -30),
        ("diffmoe", "xl", -16),
    ):
        ours, theirs = (figure("t12", model, "FID", 4.0, preset=f"promoe_{size}") for model in ("promoe", other))
        assert 100 * (ours / theirs - 1) == pytest.approx(percent, abs=0.8)


def test_rows_that_are_in_several_tables_have_equal_figures():
    for name in ("FID", "Inception score"):
        for scale in (1.0, 1.5):
            b, big = {"preset": "promoe_b"}, {"preset": "promoe_l"}
            promoe_b = {figure("t3", "promoe", name, scale, **b), figure("t7", "promoe", name, scale)}
            promoe_b |= {figure("t8", "identity", name, scale), figure("t17", "promoe", name, scale)}
            promoe_l = {figure("t3", "promoe", name, scale, **big), figure("t5", "promoe", name, scale)}
            promoe_l |= {figure("t13", "promoe", name, scale, top_k=1), figure("t15", "promoe", name, scale, top_k=1)}
            promoe_l |= {figure("t11", "promoe", name, scale, step=500_000, **big)}
            ddpm_b = {figure("t4", "promoe", name, scale, preset="promoe_b_ddpm")}
            ddpm_b |= {figure("t18", "promoe", name, scale, rcl_weight=10.0)}
            ddpm_l = {figure("t4", "promoe", name, scale, preset="promoe_l_ddpm"), figure("t10", "promoe", name, scale)}
            dense_b = {figure("t3", "dense", name, scale, **b), figure("t7", "dense", name, scale)}
            k3 = {figure(table, "promoe", name, scale, top_k=3) for table in ("t13", "t15")}
            assert [len(values) for values in (promoe_b, promoe_l, ddpm_b, ddpm_l, dense_b, k3)] == [1] * 6
        assert figure("t1", "kmeans", name, 1.5) == figure("t9", "kmeans", name, 1.5)
        assert figure("t1", "dense", name, 1.5) == figure("t3", "dense", name, 1.5, preset="promoe_b")


@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_has_the_same_models_at_the_small_scale(name):
    made, small = PAPER[name], scaled(PAPER[name], "fashion")
    tasks, small_tasks = tasks_of(made), tasks_of(small)
    assert [task.variant for task in small_tasks] == [task.variant for task in tasks]
    active = defaultdict(list)
    for task, other in zip(small_tasks, tasks, strict=True):
        model, large = task.config.model, other.config.model
        assert model.hidden_size < large.hidden_size and task.config.data.source in ("fashion_mnist", "latents")
        assert task.config.train.steps * (400 if large.has_text else 500) == other.config.train.steps
        same = ("router", "top_k", "score_function", "rcl_weight", "balance_weight", "shared_experts", "kmeans_decay")
        for option in (*same, "unconditional_experts", *["num_experts"] * (model.router != "classification")):
            # The presets of DDPM set the weight of the contrastive loss, and the small ones do not.
            if option != "rcl_weight" or "ddpm" not in str(other.point) or name == "paper/t18":
                assert getattr(model, option) == getattr(large, option), option
        assert task.config.diffusion.objective == other.config.diffusion.objective
        active[tuple(task.point.items())].append(parameters(model).active)
    assert all(max(counts) < 1.02 * min(counts) for counts in active.values()), "each is within 1 % of one number"
    assert small.ranks == 1 and small.gpu is None and not any(variant.published for variant in small.variants)
    assert (small.evaluate is None) == (made.evaluate is None and name != "paper/t6")
    assert make_recipe(recipe_dict(small)) == small


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"preset": "promoe_s", "axes": {"preset": ("dit_b", "promoe_s")}},
            "has no size for the preset dit_b; it has pro",
        ),
        ({"settings": {"train.steps": 500_001}}, "divides steps by 500, and 500001 is no multiple"),
        ({"scale": "fashion"}, "the recipe has the scale fashion already"),
        ({"compute": EqualCompute(1e18)}, "has no rule for the section `compute` of the recipe"),
    ],
)
def test_what_a_scale_cannot_change_is_refused(changes, problem):
    with pytest.raises(StudyError, match=problem):
        scaled(replace(PAPER["paper/t17"], **changes), "fashion")
    with pytest.raises(StudyError, match="did you mean fashion"):
        scaled(PAPER["paper/t17"], "fashon")


def test_a_recipe_is_planned_and_submitted_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "submit", "paper/t7", "--dry-run", "--partition=gpu"]) == 0
    output = capsys.readouterr().out
    assert "| promoe | 300,607,520 | 130,572,320 | 46.04 | 3 |" in output, "the cost comes first"
    assert output.index("GPU-hours: ") < output.index("sbatch --array=0-11 --nodes=1")
    names = [task.name for task in open_study(tmp_path / "paper" / "t7").tasks]
    assert names[:2] == ["dense-seed0", "prototypes-seed0"]
    words = ["data.path=a", "evaluate.num=100000", "--seeds", "4", "--ranks", "1"]
    assert main(["study", "plan", "paper/t18", *words]) == 0
    study = open_study(tmp_path / "paper" / "t18")
    assert {(task.seed, task.config.data.path) for task in study.tasks} == {(4, "a")}
    assert study.recipe.evaluate.num == 100_000 and study.recipe.ranks == 1 and study.recipe.launcher == ()
    capsys.readouterr()
    assert main(["study", "plan", "x", "--recipe", "paper/t18", "model.rcl_weight=3", "evaluate.count=1"]) == 2
    assert "model.rcl_weight=3: is an axis of the recipe" in capsys.readouterr().err
    assert main(["study", "plan", "x", "--recipe", "paper/fig5", "evaluate.num=9"]) == 2
    assert "the recipe has no section `evaluate`" in capsys.readouterr().err
    assert main(["study", "plan", "x", "--recipe", "paper/t7", "--preset", "digits"]) == 2
    assert "--recipe: defines the models; remove --preset" in capsys.readouterr().err
    assert main(["study", "plan", "x", "--recipe", "digits", "--scale", "fashion"]) == 2
    assert "--scale fashion: has no size for the preset digits" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_submitted_jobs_start_where_submit_was_called(tmp_path, monkeypatch):
    """The recipes have paths such as latents/train, and sbatch is called in the folder of the logs."""
    calls = []

    def sbatch(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 0, stdout="Submitted batch job 12\n")

    monkeypatch.setattr(subprocess, "run", sbatch)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "submit", "paper/t17"]) == 0
    (training, options), (evaluation, _) = calls
    assert options["cwd"].resolve() == tmp_path / "paper" / "t17" / "logs"
    assert options["env"]["MEGAPROMOE_STUDY_CWD"] == str(tmp_path)
    assert "--dependency=aftercorr:12" in evaluation and str(tmp_path / "paper" / "t17") in training


def in_memory(made):
    return Study(Path("/nowhere"), made, expand(made))


def test_gpu_hours_are_proportional_to_the_work():
    made = changed(PAPER["paper/t17"], seeds=[0])
    machine = MACHINES["a100"]
    base, longer, more = (
        arms(in_memory(changed(made, **changes)), machine)[1]
        for changes in ({}, {"settings": ["train.steps=1000000"]}, {"seeds": [0, 1, 2]})
    )
    assert longer.training == pytest.approx(2 * base.training) and longer.evaluation == pytest.approx(base.evaluation)
    assert more.training == pytest.approx(3 * base.training) and more.evaluation == pytest.approx(3 * base.evaluation)
    # 500 K steps of 256 images, three passes each; 50,000 images of 250 steps, with and without a null pass.
    ratio = (250 * 50_000 * 3) / (500_000 * 256 * 3)
    assert base.evaluation == pytest.approx(base.training * ratio, rel=0.01)


def test_a_model_that_does_not_fit_has_no_hours():
    study = in_memory(changed(PAPER["paper/t6"], seeds=[0], settings=["parallel.recompute=none"]))
    lines = list(arm_lines(study, "a100"))
    assert any(line.startswith("  tc: no layout fits") for line in lines) and "| does not fit |" in lines[3]
    assert any(line.startswith("GPU-hours: no total, since on 16 x A100 80GB SXM") for line in lines)
    sizes = "\n".join(size_lines(study))
    assert "dense: active parameters 3,090,484,288, published 3,000,000,000 (table 6, Dense Model)" in sizes
    cost = "\n".join(size_lines(in_memory(changed(PAPER["paper/t14"], seeds=[0]))))
    assert "promoe: training GPU-hours, 4 A800: published 333.33 (table 14, ProMoE-L-Flow)" in cost


# ---- beside ours


def published(**entry):
    variants = {"promoe": {"published": [{"source": "table 3, row", "figures": {"FID": 9.0}} | entry]}}
    return recipe(variants=variants, seeds=[0, 1], evaluate={"num": 500, "guidance": [1.5]})


def test_published_figures_are_shown_beside_those_of_the_same_step_scale_and_number(tmp_path):
    study = finished(tmp_path, published(at={"model.num_experts": 4}, guidance=1.5))
    rows = [
        {"task": task.name, "step": step, "guidance": scale, "count": count, "figure": "FID", "value": value}
        for task in study.tasks
        for step, scale, count, value in (
            (3, 1.5, 500, 10.0 + 2 * task.seed),
            (2, 1.5, 500, 90.0),
            (3, 1.0, 500, 80.0),
            (3, 1.5, 400, 70.0),
        )
    ]
    text = "\n".join(published_sections(study, rows))
    # Two values that differ by 2: half the interval is t(0.975, 1) · √2 / √2 = 12.706.
    assert "| promoe num_experts=4 | FID | 3 | 1.5 | 9 | 11 ± 12.7 | 2 | +2 | table 3, row |" in text
    assert "num_experts=2" not in text, "it has no published figure"
    assert "| 9 |  | 0 |  | table 3, row |" in "\n".join(published_sections(study, []))
    assert main(["study", "collect", str(tmp_path)]) == 0
    assert "## Published figures beside ours" in (tmp_path / "results.md").read_text()


def test_a_study_of_a_small_scale_shows_no_published_figures():
    small = scaled(PAPER["paper/t3"], "fashion")
    sections = list(published_sections(in_memory(replace(small, seeds=(0,))), []))
    assert len(sections) == 1 and "not comparable" in sections[0]


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"source": ""}, r"published\[0\].source: is missing"),
        ({"figures": {}}, r"published\[0\].figures: is missing"),
        ({"figures": {"FID": "low"}}, "figures.FID = 'low': must be a number"),
        ({"figures": {"FID": float("inf")}}, "figures.FID = inf: must be a number"),
        ({"at": {}}, "at: model.num_experts is missing"),
        ({"at": {"model.num_experts": 3}}, "at.model.num_experts = 3: is not a value of the axis"),
        ({"at": {"model.num_experts": 4, "train.lr": 1}}, "at: train.lr is not an axis"),
        ({"stepp": 3}, "did you mean step"),
    ],
)
def test_a_published_figure_without_source_or_place_is_refused(entry, problem):
    with pytest.raises(StudyError, match=problem):
        published(**{"at": {"model.num_experts": 4}} | entry)


@pytest.mark.full
def test_an_arm_of_a_recipe_trains_at_the_small_scale(tmp_path, capsys):
    """In place of the clothes, which are a package of the system, images of noise."""
    small = [
        "train.steps=2",
        "train.global_batch=4",
        "model.depth=2",
        "model.hidden_size=32",
        "model.input_size=16",
        "data.source=synthetic",
        "data.flip=false",
    ]
    words = ["--recipe", "paper/t7", "--scale", "fashion", "--seeds", "0", *small]
    assert main(["study", "plan", str(tmp_path), *words]) == 0
    assert "Published figures are not comparable" in capsys.readouterr().out
    study = open_study(tmp_path)
    task = next(task for task in study.tasks if task.variant == "prototypes")
    assert main(["study", "run", str(tmp_path), "--task", str(task.index)]) == 0
    assert study.done(task) and [other.name for other in study.tasks if study.done(other)] == [task.name]
    assert main(["study", "collect", str(tmp_path)]) == 0
    assert "not comparable" in (tmp_path / "results.md").read_text()
