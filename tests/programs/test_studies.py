"""Scaling studies: what a recipe means, and that nothing is lost on the way. Their numbers: test_study_numbers.py."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.small_studies import TINY, compared, recipe

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.planning.cost import parameters
from megapromoe.studies import runs
from megapromoe.studies.estimate import Speed, seconds
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import StudyError, find_recipe, make_recipe, read_recipe, recipe_dict, recipe_names
from megapromoe.studies.study import open_study, plan
from megapromoe.studies.task_locks import lock_task

ROOT = Path(__file__).parents[2]
RECIPES = [find_recipe(name) for name in recipe_names()]


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


def test_a_written_study_has_numbers_and_those_with_text_are_still_read(tmp_path, capsys):
    texts = {"train.steps": "300", "train.lr": "1e-3", "model.qk_norm": "true", "data.source": "digits"}
    call = ["study", "plan", str(tmp_path / "s"), "--preset", "digits", "--experts", "2", "4", "--seeds", "0"]
    call += ["--routers", "promoe", "tc", *settings(texts)]
    assert main(call) == 0
    file = tmp_path / "s" / "study.yaml"
    content = yaml.safe_load(file.read_text())
    typed = {"train.steps": 300, "train.lr": 0.001, "model.qk_norm": True, "data.source": "digits"}
    assert {key: content["settings"][key] for key in texts} == typed
    tasks = [(task.name, task.config) for task in open_study(tmp_path / "s").tasks]
    file.write_text(yaml.safe_dump(content | {"settings": content["settings"] | texts}, sort_keys=False))  # as 0.1 did
    assert [(task.name, task.config) for task in open_study(tmp_path / "s").tasks] == tasks
    assert main(call) == 0, "the same study"
    capsys.readouterr()


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
    assert "weights = 'mean': must be one of ema, master" in message
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


def test_values_that_files_cannot_tell_apart_are_refused():
    """The second would never be trained."""
    made = recipe(preset="fashion", axes={"data.path": ["a/b", "a_b", "c"]}, seeds=[0])
    with pytest.raises(StudyError, match="data.path = 'a/b' and 'a_b': both are named promoe-patha_b-seed0 in files"):
        expand(made)


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
    with pytest.raises(StudyError, match=f"{study.tasks[1].name}.yaml: is not what"):
        open_study(tmp_path)


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
    assert (
        main(["study", "submit", str(tmp_path), "--at-once", "2", "--dry-run", "--time=5", "--partition", "gpu"]) == 0
    )
    words = capsys.readouterr().out.split()
    assert words[:5] == ["sbatch", "--array=0-1,3-5%2", "--time=5", "--partition", "gpu"]
    assert words[5:] == [str(ROOT / "launchers" / "scaling_experts.sh"), str(tmp_path)]


def test_submit_hands_on_what_sbatch_says(tmp_path, monkeypatch, capsys):
    study = plan(tmp_path / "study", recipe(seeds=[0]))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\npwd > "$0.where"\necho "$@" > "$0.words"\nexit 4\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["study", "submit", str(study.folder)]) == 4
    assert (tmp_path / "sbatch.words").read_text().split()[0] == "--array=0-1"
    assert Path((tmp_path / "sbatch.where").read_text().strip()) == study.folder / "logs"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["study", "submit", str(study.folder)]) == 1
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


# ---- several commands at once


ONE_COMMAND = """
import os, sys, time
from pathlib import Path
from megapromoe.studies.runs import run_tasks
from megapromoe.studies.study import open_study
study = open_study(Path(sys.argv[1]))
(study.folder / f"ready-{os.getpid()}").touch()
while len(list(study.folder.glob("ready-*"))) < int(sys.argv[2]):  # all begin together
    time.sleep(0.01)
print(sorted(set(run_tasks(study, study.tasks, jobs=2).values())))
"""
# As `megapromoe train`, it fails while another process trains in its run directory; it notes each start.
ALONE = """
import fcntl
run.mkdir(parents=True, exist_ok=True)
lock = open(run / "run.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(run.parent.parent / "starts", "a") as file:
    file.write(run.name + "\\n")
time.sleep(0.5)
save(3)
"""
HELD = ALONE.replace("time.sleep(0.5)", 'while not (run.parent.parent / "go").exists(): time.sleep(0.01)')


def starts(study):
    return sorted((study.folder / "starts").read_text().split())


def test_two_commands_at_once_train_each_task_once_and_report_no_failure(tmp_path):
    study = plan(tmp_path / "s", recipe(launcher=stand_in(tmp_path, ALONE)))
    words = [sys.executable, "-c", ONE_COMMAND, str(study.folder), "2"]
    commands = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [command.communicate(timeout=120) for command in commands]
    assert [out for out, _ in ends] == ["[0]\n", "[0]\n"], ends
    assert starts(study) == sorted(task.name for task in study.tasks)
    assert "is trained by another command (pid" in ends[0][1] + ends[1][1]


@pytest.mark.parametrize("code, result, count", [(3, 3, 0), (75, 0, 1), (None, 0, 1)])
def test_what_another_command_reports_of_its_task_holds(code, result, count, tmp_path, capsys, monkeypatch):
    """It failed: that is the task's end. It was stopped, or killed before it could say anything: trained here."""
    monkeypatch.setattr(runs, "POLL", 0.02)
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, ALONE)))
    (task,) = study.tasks
    study.outcome_file(task).parent.mkdir()
    study.outcome_file(task).write_text(json.dumps({"code": 9, "said": "of an earlier start"}))
    lock, calls = lock_task(study, task), []

    def asked():
        calls.append(None)
        if len(calls) == 3:
            if code is not None:
                study.outcome_file(task).write_text(json.dumps({"code": code, "said": "of another command"}))
            lock.close()
        return False

    assert runs.run_tasks(study, study.tasks, 1, asked) == {task.name: result}
    assert capsys.readouterr().err.count("left to it") == 1
    assert (len(starts(study)) if (study.folder / "starts").exists() else 0) == count


def test_a_task_of_a_command_that_was_killed_is_waited_for(tmp_path, monkeypatch):
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, HELD)))
    words = [sys.executable, "-c", ONE_COMMAND, str(study.folder), "1"]
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    wait_until(lambda: (study.folder / "starts").exists(), first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    calls = []

    def asked():
        calls.append(None)
        if len(calls) == 3:
            assert not study.done(study.tasks[0]) and starts(study) == [study.tasks[0].name]
            (study.folder / "go").touch()
        return False

    monkeypatch.setattr(runs, "POLL", 0.02)
    assert set(runs.run_tasks(study, study.tasks, 1, asked).values()) == {0}
    assert len(starts(study)) == 1 and len(calls) >= 3


def test_asked_to_stop_a_command_does_not_wait_for_others(tmp_path):
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, ALONE)))
    with lock_task(study, study.tasks[0]):
        assert runs.run_tasks(study, study.tasks, 1, lambda: True) == {study.tasks[0].name: 75}
    assert not (study.folder / "starts").exists()


def test_tasks_are_trained_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("megapromoe.studies.task_locks.fcntl.flock", none)
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, "save(3)\n")))
    assert set(runs.run_tasks(study, study.tasks).values()) == {0}
    assert "no locks here (No locks available); let only one command train this task" in caplog.text


# ---- all of it, for real


@pytest.mark.full
def test_two_real_commands_at_once_train_and_evaluate_one_study(tmp_path):
    study = plan(tmp_path / "s", recipe(seeds=[0]))
    words = [sys.executable, "-m", "megapromoe", "study", "run", str(study.folder)]
    commands = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [command.communicate(timeout=600)[1] for command in commands]
    finally:
        for command in commands:
            command.kill()
    assert [command.returncode for command in commands] == [0, 0], said
    assert all("2 of 2 done, 0 failed" in text for text in said)
    for task in study.tasks:
        steps = [json.loads(line)["step"] for line in (study.run(task) / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3] and study.loss_file(task).exists()


@pytest.mark.full
def test_a_tiny_study_end_to_end_killed_in_between(tmp_path, capsys):
    """plan, run, kill -9 of tool and training, run again, collect, plot; equal to a run that nobody disturbed."""
    folder = tmp_path / "study"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(recipe(seeds=[0], settings=TINY | {"train.steps": 40}))))
    assert main(["study", "plan", str(folder), "--recipe", str(file), "--throughput", "1e9"]) == 0
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
    assert main(["study", "collect", str(folder)]) == 0
    assert "2 runs are done." in (folder / "results.md").read_text()
    losses = [float(line["fixed_loss"]) for line in csv.DictReader((folder / "results.csv").read_text().splitlines())]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 3 for loss in losses)
    assert main(["study", "plot", str(folder)]) == 0
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
    assert main(["study", "run", str(tmp_path)]) == 2
    assert "holds no study.yaml" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--preset", "digits", "--routers", "promo"]) == 2
    assert "must be one of dense" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit) as caught:
        main(["study", "run", str(tmp_path), "--jobs", "0"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["study", "run", str(tmp_path), "train.steps=3"])
    assert caught.value.code == 2 and "only `plan` takes them" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--preset", "digits", "steps"]) == 2
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", "digit"]) == 2
    assert "did you mean digits" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", "digits", "--seeds", "1", "train.steps=3"]) == 2
    assert "leave out seeds, settings" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


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
    assert main(["study", "plan", str(tmp_path), *words, "train.steps=7", "train.warmup=2"]) == 0
    study = open_study(tmp_path)
    assert len(study.tasks) == 2 * (4 + 4 + 1) and study.recipe.baseline == "dense"
    assert {task.config.train.steps for task in study.tasks} == {7}
    active = [parameters(task.config.model).active for task in study.tasks]
    assert max(active) / min(active) < 1.02


# ---- settings that only some of the models can take


def planned(folder, capsys, *words: str, code: int = 0) -> str:
    """What `study plan` says of ProMoE, token choice and dense."""
    routers = [] if "--routers" in words else ["--routers", "promoe", "tc", "dense"]
    assert main(["study", "plan", str(folder), "--preset", "promoe_b", "--seeds", "0", *routers, *words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


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
    ],
)
def test_a_setting_that_a_model_cannot_take_is_that_of_the_preset_there(routers, setting, expected, tmp_path, capsys):
    planned(tmp_path, capsys, "--routers", *routers.split(), "--ranks", "8", "--launcher", "srun python", setting)
    section, _, name = setting.partition("=")[0].partition(".")
    found = {task.variant: getattr(getattr(task.config, section), name) for task in open_study(tmp_path).tasks}
    assert found == expected


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
    with pytest.raises(StudyError, match=r"parallel.ep = 2.*\[dense-seed0.*; other tasks can take it: set the value"):
        expand(made)
    content = recipe_dict(made)
    content["variants"]["dense"]["settings"]["parallel.ep"] = 1
    assert {task.variant: task.config.parallel.ep for task in expand(make_recipe(content))} == {"promoe": 2, "dense": 1}


# ---- jobs of several ranks


def submitted(folder, launcher: str, ranks: int, capsys, *words: str, code: int = 0) -> str:
    """The options of sbatch that `study submit` prints, or why it prints none."""
    if not folder.exists():
        plan(folder, recipe(seeds=[0], ranks=ranks, launcher=launcher.split()))
    assert main(["study", "submit", str(folder), "--dry-run", *words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out.split("--array=0-1 ")[1].split(str(ROOT))[0].strip()


@pytest.mark.parametrize(
    "launcher, ranks, words, expected",
    [
        ("torchrun --nproc-per-node 8", 8, [], "--nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=96"),
        ("torchrun --nproc-per-node 4", 4, [], "--nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=48"),
        ("srun python", 4, [], "--nodes=1 --ntasks=4 --ntasks-per-node=4 --gpus-per-node=4"),
        ("srun python", 16, [], "--nodes=2 --ntasks=16 --ntasks-per-node=8 --gpus-per-node=8"),
        ("srun python", 16, ["--gpus-per-node=a100:4"], "--nodes=4 --ntasks=16 --ntasks-per-node=4 --gpus-per-node=4"
         " --gpus-per-node=a100:4"),
        ("/usr/bin/srun python", 8, ["--nodes", "4"], "--nodes=4 --ntasks=8 --ntasks-per-node=2 --gpus-per-node=2"
         " --nodes 4"),
        ("srun python", 8, ["-N4"], "--nodes=4 --ntasks=8 --ntasks-per-node=2 --gpus-per-node=2 -N4"),
        ("srun python", 8, ["--nodelist=n1"], "--nodes=1 --ntasks=8 --ntasks-per-node=8 --gpus-per-node=8"
         " --nodelist=n1"),
    ],
)  # fmt: skip
def test_submit_asks_for_what_the_ranks_need(launcher, ranks, words, expected, tmp_path, capsys):
    assert submitted(tmp_path / "s", launcher, ranks, capsys, *words) == expected


def test_ranks_that_the_launcher_cannot_reach_are_refused(tmp_path, capsys):
    said = submitted(tmp_path / "s", "torchrun --standalone --nproc-per-node 16", 16, capsys, code=2)
    assert "16 ranks take 2 nodes of 8 GPUs; plan the study with --launcher 'srun python'" in said
    assert submitted(tmp_path / "s", "", 16, capsys, "--gpus-per-node=16").startswith("--nodes=1 --ntasks=1 ")
    said = submitted(tmp_path / "t", "srun python", 8, capsys, "--nodes=3", code=2)
    assert "ranks = 8: do not spread evenly over 3 nodes; give --nodes=N, N one of 1, 2, 4, 8" in said


def test_srun_is_asked_to_save_by_the_signal_that_it_hands_on(tmp_path):
    """It would kill the ranks at SIGTERM."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\ntrap \'echo USR1 > "$0.heard"; exit 75\' USR1\n: > "$0.started"\n'
                    "while :; do sleep 0.1; done\n")  # fmt: skip
    srun.chmod(0o755)
    study = plan(tmp_path / "s", recipe(seeds=[0], ranks=2, launcher=[str(srun), "python"]))
    codes = runs.run_tasks(study, study.tasks[:1], 1, lambda: (tmp_path / "srun.started").exists())
    assert set(codes.values()) == {75} and (tmp_path / "srun.heard").read_text() == "USR1\n"


# ---- states


def test_a_task_that_a_signal_killed_says_so(tmp_path, capfd):
    code = "os.kill(os.getpid(), signal.SIGKILL)"
    study = plan(tmp_path / "s", recipe(seeds=[0], launcher=stand_in(tmp_path, code)))
    runs.run_tasks(study, study.tasks[:1])
    first, second = study.tasks
    assert study.state(first) == "killed by SIGKILL, none of 3 steps saved"
    assert study.state(second) == "not started"
    assert "promoe-e2-seed0: killed by SIGKILL after" in capfd.readouterr().err


def test_a_task_killed_together_with_the_program_that_started_it_says_so(tmp_path):
    code = """
(run.parent.parent / "started").write_text(str(saved))
run.mkdir(parents=True, exist_ok=True)
(run / "metrics.jsonl").write_text('{"step": 2}\\n')
time.sleep(60)
"""
    study = plan(tmp_path / "s", recipe(seeds=[0], launcher=stand_in(tmp_path, code)))
    study.outcome_file(study.tasks[0]).parent.mkdir()
    study.outcome_file(study.tasks[0]).write_text('{"code": 75, "said": ""}')  # of an earlier start
    process = subprocess.Popen(
        [sys.executable, "-m", "megapromoe", "study", "run", str(study.folder), "--task", "0"],
        start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until((study.folder / "started").exists, process)
    process.kill()
    process.wait()
    for pid in [
        pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if str(study.folder) in command_of(pid)
    ]:
        os.kill(pid, signal.SIGKILL)
    assert study.state(study.tasks[0]).startswith("killed together with what had started it")
    assert study.state(study.tasks[0]).endswith("none of 3 steps saved, 2 logged")


def test_a_task_in_training_says_so(tmp_path):
    from megapromoe.checkpoint.run_directory import RunDirectory

    study = plan(tmp_path / "s", recipe(seeds=[0]))
    task = study.tasks[0]
    with RunDirectory.open(study.run(task), task.config, 1):
        assert study.state(task).startswith(f"in training (pid {os.getpid()} on ")
    assert "in training" not in study.state(task)
