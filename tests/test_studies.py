"""Scaling studies: what a recipe means, that nothing is lost on the way, that the numbers and the fits are right."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import yaml

from megapromoe.config import resolve
from megapromoe.cost import parameters
from megapromoe.data.builtin import Digits
from megapromoe.evaluation.heldout import objective_loss
from megapromoe.studies import runs
from megapromoe.studies.collect import evaluated, row
from megapromoe.studies.estimate import Speed, seconds
from megapromoe.studies.fit import FitError, fit_power_law
from megapromoe.studies.grid import expand
from megapromoe.studies.plots import draw_all
from megapromoe.studies.recipe import StudyError, make_recipe, read_recipe, recipe_dict
from megapromoe.studies.study import open_study, plan
from megapromoe.studies.tables import differences, fits, groups, mean_of, to_csv, to_markdown, trends

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import scaling_study as tool  # noqa: E402

TINY = {"model.hidden_size": 32, "model.depth": 2, "model.heads": 2, "train.global_batch": 16, "sample.batch": 32}
TINY |= {"train.steps": 3, "train.warmup": 0, "train.log_every": 1, "train.save_every": 1}
RECIPES = sorted((ROOT / "tools" / "studies").glob("*.yaml"))


def recipe(**changes):
    said = {
        "preset": "digits",
        "settings": TINY,
        "axes": {"model.num_experts": [2, 4]},
        "seeds": [0, 1],
        "variants": {"promoe": {}},
    }
    return make_recipe(said | changes)


def compared(**changes):
    """ProMoE, TC and dense at equal active parameters."""
    tc = {"model.router": "tc", "model.shared_expert": False, "model.unconditional_expert": False}
    return recipe(
        variants={
            "promoe": {},
            "tc": {"settings": tc, "match": "model.expert_ratio"},
            "dense": {
                "settings": {"model.router": "dense", "model.mlp_ratio": 1.0},
                "match": "model.mlp_ratio",
                "without": ["model.num_experts"],
            },
        },
        active_parameters={"like": {"model.num_experts": 2}, "tolerance": 0.01, "multiple": 4},
        baseline="dense",
        **changes,
    )


# ---- what a recipe means


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
    found = {task.name: (task.config.model.hidden_size, task.config.train.steps) for task in expand(made)}
    assert found == {
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


def test_everything_wrong_with_a_recipe_is_told_at_once():
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
    for said in (
        "did you mean preset?",
        "preset: is missing",
        "model.num_experts",
        "seeds",
        "a/b",
        "did you mean settings?",
    ):
        assert said in message
    assert "weights = 'mean': must be ema or master" in message
    assert "tolerance" in message and "needs a launcher" in message


def test_configs_that_cannot_run_are_told_with_the_tasks_that_have_them():
    with pytest.raises(
        StudyError, match=r"model.heads = 5.*\[promoe-e2-seed0, promoe-e4-seed0, .* and 1 more\]"
    ) as caught:
        expand(recipe(settings=TINY | {"model.heads": 5}))
    assert len(caught.value.violations) == 1
    with pytest.raises(StudyError, match="'baseline' = 'x'|baseline = 'x'"):
        expand(recipe(baseline="x"))
    with pytest.raises(StudyError, match="is an axis"):
        expand(recipe(variants={"promoe": {"settings": {"model.num_experts": 3}}}))


def test_active_parameters_that_cannot_be_equal_are_refused():
    variants = {
        "dense": {"settings": {"model.router": "dense", "model.mlp_ratio": 1.0}, "without": ["model.num_experts"]}
    }
    with pytest.raises(StudyError, match=r"dense has .* off the .* asked for.*name a ratio to solve"):
        expand(recipe(variants=variants, active_parameters={"like": {}}))
    variants["dense"]["match"] = "model.expert_ratio"
    with pytest.raises(StudyError, match="does not change the active parameters"):
        expand(recipe(variants=variants, active_parameters={"like": {}}))


# ---- the folder


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


def test_a_recipe_that_has_come_to_mean_something_else_is_refused(tmp_path):
    study = plan(tmp_path, recipe())
    file = study.config(study.tasks[1])
    file.write_text(file.read_text().replace("lr: 0.004", "lr: 0.003"))
    with pytest.raises(StudyError, match=f"{study.tasks[1].name}.yaml: is not what"):
        open_study(tmp_path)


def test_a_checkpoint_that_is_being_written_does_not_count(tmp_path):
    study = plan(tmp_path, recipe())
    for name in ("step-00000002", "step-00000003.writing"):
        folder = study.run(study.tasks[0]) / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert study.steps_saved(study.tasks[0]) == 2 and not study.done(study.tasks[0])


def test_submit_asks_for_the_missing_ones_alone(tmp_path, capsys):
    study = plan(tmp_path, recipe(seeds=[0, 1, 2]))
    done = study.run(study.tasks[2]) / "checkpoints" / "step-00000003"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    assert tool.main(["submit", str(tmp_path), "--at-once", "2", "--dry-run", "--time=5", "--partition", "gpu"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:5] == ["sbatch", "--array=0-1,3-5%2", "--time=5", "--partition", "gpu"]
    assert words[5:] == [str(ROOT / "launchers" / "scaling_experts.sh"), str(tmp_path)]


def test_submit_hands_on_what_sbatch_says(tmp_path, monkeypatch, capsys):
    study = plan(tmp_path / "study", recipe(seeds=[0]))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\npwd > "$0.where"\necho "$@" > "$0.words"\nexit 4\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert tool.main(["submit", str(study.folder)]) == 4
    assert (tmp_path / "sbatch.words").read_text().split()[0] == "--array=0-1"
    assert Path((tmp_path / "sbatch.where").read_text().strip()) == study.folder / "logs"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert tool.main(["submit", str(study.folder)]) == 1
    assert "sbatch is not here" in capsys.readouterr().err


def test_hours_add_up():
    study = plan_in_memory(recipe())
    speeds = {"promoe": Speed(1e6, start=7.0)}
    assert seconds(study, speeds) == pytest.approx(4 * 7 + sum(task.flops for task in study.tasks) / 1e6)


def plan_in_memory(made):
    from megapromoe.studies.study import Study

    return Study(Path("/nowhere"), made, expand(made))


# ---- running: programs that stand for the training


def stand_in(tmp_path, code: str) -> list[str]:
    """A launcher that runs `code` in place of the training; it finds the task's config and folder as `c` and `run`."""
    script = tmp_path / "stand_in.py"
    head = """\
import json, os, pathlib, signal, sys, time, yaml
def words(name): return pathlib.Path(sys.argv[sys.argv.index(name) + 1])
c, run = yaml.safe_load(words("--config").read_text()), words("--run-dir")
def save(step):
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (run / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
saved = max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)
"""
    script.write_text(head + code)
    return [sys.executable, str(script)]


def test_a_task_that_fails_does_not_stop_the_others(tmp_path, capfd):
    code = """
if c["model"]["num_experts"] == 2 and c["train"]["seed"] == 0:
    print("Traceback\\nmegapromoe: the disk is full\\n  - remove something", flush=True)
    sys.exit(3)
save(3)
"""
    study = plan(tmp_path / "s", recipe(launcher=stand_in(tmp_path, code)))
    codes = runs.run_tasks(study, study.tasks, jobs=2)
    assert codes == {"promoe-e2-seed0": 3, "promoe-e4-seed0": 0, "promoe-e2-seed1": 0, "promoe-e4-seed1": 0}
    assert runs.exit_code(codes) == 1
    outcome = study.outcome(study.tasks[0])
    assert outcome["code"] == 3 and outcome["said"] == "megapromoe: the disk is full\n  - remove something"
    assert study.state(study.tasks[0]).startswith("failed (exit code 3)")
    assert [task.name for task in study.missing()] == ["promoe-e2-seed0"]
    assert "promoe-e2-seed0: failed with exit code 3" in capfd.readouterr().err


def test_a_training_that_claims_success_without_its_last_step_has_failed(tmp_path):
    study = plan(tmp_path / "s", recipe(seeds=[0], launcher=stand_in(tmp_path, "save(2)\n")))
    assert set(runs.run_tasks(study, study.tasks).values()) == {1}


def test_a_launcher_that_is_not_there_is_told(tmp_path):
    study = plan(tmp_path, recipe(seeds=[0], launcher=["no-such-launcher"]))
    codes = runs.run_tasks(study, study.tasks[:1])
    assert codes == {"promoe-e2-seed0": 127}
    assert "no-such-launcher" in study.outcome(study.tasks[0])["said"]


def test_exit_codes():
    assert runs.exit_code({"a": 0, "b": 0}) == 0
    assert runs.exit_code({"a": 0, "b": 2}) == 1
    assert runs.exit_code({"a": 75, "b": 2}) == 75
    assert runs.exit_code({"a": 75}) == 75
    assert runs.exit_code({"a": 76}) == 76
    assert runs.exit_code({"a": -9}) == 137
    assert runs.exit_code({}) == 0


def test_asked_to_stop_the_running_save_and_the_waiting_do_not_start(tmp_path):
    code = """
def stop(*_): save(saved + 1); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(run.parent.parent / "started").write_text(str(saved))
time.sleep(60)
"""
    study = plan(tmp_path / "s", recipe(launcher=stand_in(tmp_path, code)))
    begun = time.monotonic()
    codes = runs.run_tasks(study, study.tasks, 1, lambda: (study.folder / "started").exists())
    assert time.monotonic() - begun < 30
    assert set(codes.values()) == {75} and runs.exit_code(codes) == 75
    assert [study.steps_saved(task) for task in study.tasks] == [1, 0, 0, 0]
    assert study.state(study.tasks[0]) == "1 of 3 steps saved"


# ---- numbers


def finished(tmp_path, made, loss=lambda task: 0.5):
    """A study whose every task looks done, with metrics whose means are known."""
    study = plan(tmp_path, made)
    for task in study.tasks:
        saved = study.run(task) / "checkpoints" / f"step-{task.config.train.steps:08d}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text("{}")
        lines = []
        moe = len(task.config.model.moe_blocks)
        for step in range(1, task.config.train.steps + 1):
            line = {"step": step, "loss": 9.0, "denoising": 1.0 + step, "images_per_second": 100.0 + step**2}
            line |= {"flops_per_second": 5.0, "memory_bytes": 1000 - step}
            if moe:
                experts = task.config.model.num_experts
                line |= {"dead_experts": step, "load_entropy": 0.5, "load_max_over_mean": 2.0}
                line["expert_load"] = [[1] * experts] * moe
            lines.append(json.dumps(line))
        (study.run(task) / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "half a li')
        study.loss_file(task).parent.mkdir(exist_ok=True)
        known = {"step": task.config.train.steps, "weights": "ema", "split": "train", "draws": 8192, "loss": loss(task)}
        study.loss_file(task).write_text(json.dumps(known | {"standard_error": 0.01}))
    return study


def rows(study):
    return [row(study, task) for task in study.tasks]


def test_collected_numbers_are_exact(tmp_path):
    study = finished(tmp_path, compared(settings=TINY | {"train.steps": 20}))
    found = row(study, study.tasks[0])
    assert found["training_loss"] == 1 + 19.5 and found["dead_experts"] == 19.5, "steps 19 and 20: the last tenth"
    assert found["dead_share"] == 19.5 / 2
    assert found["images_per_second"] == 100 + (10**2 + 11**2) / 2
    assert found["memory_bytes"] == 999 and found["fixed_loss"] == 0.5
    assert found["images"] == 320 and found["experts"] == 2 and found["model.num_experts"] == 2
    assert found["training_flops"] == found["flops_per_image"] * 320
    dense = next(r for r in rows(study) if r["variant"] == "dense")
    assert dense["experts"] is None and dense["dead_share"] is None and "model.num_experts" not in dense
    table = list(csv.DictReader(to_csv(rows(study)).splitlines()))
    assert len(table) == 10 and float(table[0]["training_loss"]) == 20.5 and table[2]["experts"] == ""


def test_a_loss_of_another_checkpoint_does_not_count(tmp_path, capsys):
    study = finished(tmp_path, recipe(seeds=[0]))
    one, other = study.tasks
    file = study.loss_file(one)
    file.write_text(file.read_text().replace('"step": 3', '"step": 2'))
    assert not evaluated(study, one) and evaluated(study, other) and not evaluated(study, other, draws=5)
    file.write_text(file.read_text().replace('"step": 2', '"step": 3').replace('"ema"', '"master"'))
    assert not evaluated(study, one), "of other weights"
    with pytest.raises(StudyError, match="not computed yet"):
        row(study, one)
    assert tool.main(["plot", str(tmp_path)]) == 0
    assert f"not computed yet (`collect` does): {one.name}" in capsys.readouterr().err


def test_differences_pair_the_seeds(tmp_path):
    # Seeds differ wildly, pairs hardly: tc is 0.1 and 0.12 above dense with 2 experts, 0.2 and 0.22 with 4.
    def loss(task):
        extra = {"dense": 0.0, "promoe": -0.3, "tc": 0.05 * task.config.model.num_experts + 0.02 * task.seed}
        return 10.0 * task.seed + extra[task.variant]

    study = finished(tmp_path, compared(), loss)
    found = differences(rows(study), study.recipe, "dense")
    assert found["tc", (("model.num_experts", 2),)].mean == pytest.approx(0.11)
    assert found["tc", (("model.num_experts", 4),)].mean == pytest.approx(0.21)
    assert found["promoe", (("model.num_experts", 4),)].mean == pytest.approx(-0.3)
    assert not found["tc", (("model.num_experts", 2),)].differs, "two seeds 0.02 apart say ± 0.127"
    assert found["promoe", (("model.num_experts", 4),)].differs
    assert not [key for key in found if key[0] == "dense"]
    assert found["tc", None].mean == pytest.approx(0.16) and found["tc", None].runs == 2
    assert found["tc", None].half == pytest.approx(12.7062 * 0.01, rel=1e-4), "0.15 and 0.17: two seeds, not four runs"
    to_tc = differences(rows(study), study.recipe, "tc")
    assert to_tc["dense", ()].mean == pytest.approx(-0.16) and to_tc["dense", ()].runs == 2
    assert to_tc["promoe", (("model.num_experts", 4),)].mean == pytest.approx(-0.51)
    text = to_markdown(rows(study), study.recipe, ["x (failed)"], ["dense"])
    assert "| tc num_experts=2 | +0.1100 ± 0.1271 | 2 | no |" in text and "x (failed)" in text
    assert list(groups(rows(study), study.recipe))[-1] == ("dense", ())


def test_a_trend_is_seen_through_the_seeds(tmp_path):
    slopes = (0.1, 0.2)
    made = recipe(axes={"model.num_experts": [2, 4, 8]})
    study = finished(tmp_path, made, lambda t: 5 * t.seed + slopes[t.seed] * math.log2(t.config.model.num_experts))
    found = trends(rows(study), study.recipe)
    assert found["promoe", ()].mean == pytest.approx(0.15) and found["promoe", ()].runs == 2
    assert found["promoe", ()].half == pytest.approx(12.7062 * 0.05, rel=1e-4)
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
        doubted += bool(law.doubts)
        low, high = law.band(np.array([10.0]))
        hits.append(
            (
                law.a_interval[0] <= 0.4 <= law.a_interval[1],
                law.c_interval[0] <= 0.7 <= law.c_interval[1],
                low[0] <= 0.4 + 0.3 * 10**-0.7 <= high[0],
            )
        )
    assert doubted <= 4, "a test at the 5 % level doubts one true law in 20"
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
    assert any("no more than with the seed" in doubt for doubt in fit_power_law(x, flat).doubts)
    x, rising = runs_of(0.4, -0.3, 0.7, 0.002, 5)
    assert any("rises" in doubt for doubt in fit_power_law(x, rising).doubts)
    x = np.repeat([4.0, 8, 16, 32, 64], 3)
    bumpy = np.repeat([1.0, 0.5, 0.9, 0.4, 0.8], 3) + np.tile([-0.01, 0, 0.01], 5)
    assert any("off the law" in doubt for doubt in fit_power_law(x, bumpy).doubts)


@pytest.mark.parametrize(
    "x, loss, why",
    [
        ([4, 4, 8, 8], [1, 1.1, 0.9, 0.8], "2 different x"),
        ([4, 4, 8, 16], [1, 1.1, 0.9, 0.8], "3 different x"),
        ([4, 8, 16, 32], [1, 0.9, 0.8, 0.7], "two seeds"),
        ([10, 10, 11, 12, 13], [1, 1, 0.9, 0.8, 0.7], "spans a factor of 1.3"),
        ([0, 4, 8, 16, 16], [1, 1, 0.9, 0.8, 0.7], "must be positive"),
        ([4, 4, 8, 16, 32], [1, math.nan, 0.9, 0.8, 0.7], "must be positive, and all of it finite"),
    ],
)
def test_no_law_is_put_through_too_little(x, loss, why):
    with pytest.raises(FitError, match=why):
        fit_power_law(np.array(x, dtype=float), np.array(loss, dtype=float))


def test_pictures_of_every_kind_of_study(tmp_path):
    steps = {"train.steps": [3, 6, 12, 24]}
    settings = {key: value for key, value in TINY.items() if key != "train.steps"}
    shown = {
        "lone": (recipe(seeds=[0], axes={}), {"loss_compute", "routing", "cost"}),
        "experts": (compared(), {"loss_experts", "loss_compute", "routing", "cost"}),
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
    found = fits(rows(study), study.recipe)
    assert set(found) == {
        *(("promoe", "experts", (("train.steps", steps),)) for steps in (3, 6, 12, 24)),
        *(("promoe", "training_flops", (("model.num_experts", experts),)) for experts in (2, 4, 8, 16)),
    }
    assert all(law.c == pytest.approx(1, abs=0.02) and not law.doubts for law in found.values())


# ---- the held-out loss


def test_the_held_out_loss_is_what_its_definition_says():
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


# ---- all of it, for real


def test_a_tiny_study_end_to_end_killed_in_between(tmp_path, capsys):
    """plan, run, kill -9 of tool and training, run again, collect, plot; equal to a run that nobody disturbed."""
    folder = tmp_path / "study"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(recipe(seeds=[0], settings=TINY | {"train.steps": 40}))))
    assert tool.main(["plan", str(folder), "--recipe", str(file), "--throughput", "1e9"]) == 0
    assert "estimate:" in capsys.readouterr().out
    study = open_study(folder)
    command = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), "run", str(folder), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(study.steps_saved(task) >= 5 for task in study.tasks), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trainings = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if str(folder) in command_of(pid)]
    for pid in trainings:
        os.kill(pid, signal.SIGKILL)
    assert trainings
    saved = [study.steps_saved(task) for task in study.tasks]
    assert min(saved) < 40

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not study.missing()
    starts = [json.loads((study.run(task) / "environment.json").read_text()) for task in study.tasks]
    assert all(len(start) == 2 for start in starts), "taken up again, not begun anew"
    for task in study.tasks:
        steps = [json.loads(line)["step"] for line in (study.run(task) / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 41))
    assert all(study.loss_file(task).exists() for task in study.tasks)
    capsys.readouterr()
    assert tool.main(["collect", str(folder)]) == 0
    assert "2 runs are done." in (folder / "results.md").read_text()
    losses = [float(line["fixed_loss"]) for line in csv.DictReader((folder / "results.csv").read_text().splitlines())]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 3 for loss in losses)
    assert tool.main(["plot", str(folder)]) == 0
    for name in ("loss_experts", "loss_compute", "routing", "cost"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def wait_until(condition, process, limit=120):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_wrong_commands_are_told(tmp_path, capsys):
    assert tool.main(["run", str(tmp_path)]) == 2
    assert "holds no study.yaml" in capsys.readouterr().err
    assert tool.main(["plan", str(tmp_path / "s"), "--preset", "digits", "--routers", "promo"]) == 2
    assert "must be one of dense" in capsys.readouterr().err
    assert tool.main(["plan", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit) as caught:
        tool.main(["run", str(tmp_path), "--jobs", "0"])
    assert caught.value.code == 2


def test_options_make_a_recipe(tmp_path, capsys):
    words = [
        "--preset",
        "digits",
        "--experts",
        "4",
        "8",
        "16",
        "32",
        "--routers",
        "promoe",
        "tc",
        "dense",
        "--seeds",
        "0",
        "1",
    ]
    assert tool.main(["plan", str(tmp_path), *words, "train.steps=7", "train.warmup=2"]) == 0
    study = open_study(tmp_path)
    assert len(study.tasks) == 2 * (4 + 4 + 1) and study.recipe.baseline == "dense"
    assert {task.config.train.steps for task in study.tasks} == {7}
    active = [parameters(task.config.model).active for task in study.tasks]
    assert max(active) / min(active) < 1.02
