"""The processes of a study's jobs: ranks of each variant, GPUs of jobs that run together, evaluations elsewhere."""

import csv
import json
import sys
from dataclasses import replace

import pytest
from support.small_studies import TINY, finished, recipe
from support.stand_ins import FOUR, SECTION, evaluating_study, starts

from megapromoe.cli import main
from megapromoe.distributed import runtime
from megapromoe.studies import runs
from megapromoe.studies.collect import row
from megapromoe.studies.devices import Devices
from megapromoe.studies.evaluations import evaluation_of
from megapromoe.studies.job_processes import command
from megapromoe.studies.placement import Placement, on_this_machine, placement_of, standalone
from megapromoe.studies.recipe import StudyError, make_recipe, recipe_dict
from megapromoe.studies.runs import Limits, jobs_to_run
from megapromoe.studies.study import open_study, plan
from megapromoe.studies.tables import to_markdown

LARGE = {"large": {"settings": {"model.depth": 3}, "ranks": 4, "nodes": 2, "launcher": ["srun", "python"]}}


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)


def placed(**changes):
    """Two variants with different ranks, and evaluations of one rank."""
    made = {"settings": FOUR, "axes": {}, "seeds": [0], "variants": {"small": {}} | LARGE, "ranks": 2}
    made |= {"launcher": ["torchrun", "--standalone", "--nproc-per-node", "{ranks}"]}
    return recipe(**(made | {"evaluate": SECTION | {"ranks": 1}} | changes))


def test_a_variant_and_the_evaluations_have_their_own_processes(tmp_path):
    made = placed()
    assert make_recipe(recipe_dict(made)) == made
    study = plan(tmp_path, made)
    small, small_evaluation, large, large_evaluation = study.jobs()[:4]
    assert placement_of(made, small) == Placement(2, ("torchrun", "--standalone", "--nproc-per-node", "2"))
    assert placement_of(made, large) == Placement(4, ("srun", "python"), nodes=2)
    assert placement_of(made, small_evaluation) == placement_of(made, large_evaluation) == Placement(1, ())
    assert command(study, small)[:6] == [*placement_of(made, small).launcher, "-m", "megapromoe"]
    assert command(study, large_evaluation)[:4] == [sys.executable, "-m", "megapromoe", "evaluate"]
    same = replace(made, evaluate=replace(made.evaluate, ranks=0))
    as_training = evaluation_of(same, large)
    assert placement_of(same, as_training) == placement_of(made, large), "without `ranks`, as the training"
    assert open_study(tmp_path).tasks == study.tasks


def test_each_number_of_ranks_is_an_array_of_its_own(tmp_path, capsys):
    study = plan(tmp_path / "s", placed(gpus_per_node=4))
    words = ["study", "submit", str(study.folder), "--dry-run", "--time=5", "--retries", "4"]
    assert main([*words, "--evaluation-options", "--time=1 --partition=small"]) == 0
    script = f"/launchers/scaling_experts.sh {study.folder}"
    lines = [line.replace(line.split()[-2 - ("--evaluate" in line)], "S") for line in
             capsys.readouterr().out.replace(script, "/S").splitlines()]  # fmt: skip
    wait = "--dependency=aftercorr:JOBID --kill-on-invalid-dep=yes"
    assert [line.partition(" S")[0].partition(" /")[0] for line in lines] == [
        "sbatch --array=0 --nodes=1 --ntasks=1 --gpus-per-node=2 --cpus-per-task=24 --time=5",
        f"sbatch --array=0 --time=5 --time=1 --partition=small {wait}",
        "sbatch --array=1 --nodes=2 --ntasks=4 --ntasks-per-node=2 --gpus-per-node=2 --time=5",
        f"sbatch --array=1 --time=5 --time=1 --partition=small {wait}",
    ]
    assert all(line.endswith("--retries=4") for line in lines)
    assert main([*words, "--train"]) == 0 and capsys.readouterr().out.count("sbatch") == 2
    assert main([*words, "--evaluate"]) == 0
    assert "no trained task lacks its evaluation" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"launcher": [], "ranks": 1, "evaluate": SECTION | {"ranks": 2}}, "evaluate.ranks = 2: needs a launcher"),
        ({"launcher": [], "ranks": 1, "variants": {"a": {"ranks": 2}}}, "variants.a.ranks = 2: needs a launcher"),
        ({"launcher": ["torchrun", "--nproc-per-node", "2"], "variants": {"a": {"ranks": 4}}},
         "variants.a.ranks = 4: its launcher starts 2; write '{ranks}' in the launcher"),
        ({"variants": {"a": {"ranks": -1}}}, "variants.a.ranks = -1"),
    ],
)  # fmt: skip
def test_ranks_that_nothing_starts_are_refused(changes, reason):
    with pytest.raises(StudyError) as caught:
        placed(**changes)
    assert reason in str(caught.value)


def test_ranks_over_which_a_variant_does_not_divide_are_refused():
    from megapromoe.studies.grid import expand

    variants = {"small": {}, "large": {"ranks": 3, "launcher": ["srun", "python"]}}
    with pytest.raises(StudyError, match=r"train.global_batch = 16.* 3 .*\[large-seed0\]"):
        expand(placed(variants=variants))


def test_run_with_ranks_replaces_the_launchers_of_this_command_alone(tmp_path):
    study = plan(tmp_path, placed())
    before = (tmp_path / "study.yaml").read_bytes()
    placed_study = on_this_machine(study, 2)
    assert {placement_of(placed_study.recipe, job) for job in placed_study.jobs()} == {Placement(2, standalone(2))}
    assert standalone(2)[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert {placement_of(on_this_machine(study, 1).recipe, job) for job in study.jobs()} == {Placement(1, ())}
    with pytest.raises(StudyError, match=r"--ranks 3: train.global_batch = 16.*\[small-seed0\]"):
        on_this_machine(study, 3)
    assert (tmp_path / "study.yaml").read_bytes() == before


# ---- GPUs of one machine


def test_gpus_are_given_to_as_many_ranks():
    devices = Devices(["0", "1", "2"], jobs=3)
    pair, single = Placement(2, ("torchrun",)), Placement(1, ())
    first = devices.take(pair)
    assert first == ("0", "1") and devices.take(pair) is None and devices.take(single) == ("2",)
    assert devices.take(Placement(8, ("srun", "python"))) == (), "its ranks are elsewhere"
    devices.give_back(first)
    assert devices.take(pair) == ("0", "1") and devices.take(single) is None
    shared = Devices(["0", "1"], jobs=3)
    assert [shared.take(single) for _ in range(3)] == [("0",), ("1",), ("0",)], "as many jobs as asked for"
    assert shared.take(pair) is None and Devices(["0", "1"], jobs=4).take(pair) == ("0", "1")
    assert Devices(["0"]).take(Placement(4, ("torchrun",))) == ("0",), "more ranks than GPUs share them"
    assert Devices().take(pair) == ()


def test_the_gpus_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-a,-1")
    assert runtime.visible_gpus() == ("3", "GPU-a")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.visible_gpus() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: a)'\necho 'GPU 1: NVIDIA H100 (UUID: b)'\n")
    program.chmod(0o755)
    assert runtime.visible_gpus() == ("0", "1")


def test_jobs_that_run_together_do_not_share_a_gpu(tmp_path):
    code = """
with open(study / "devices", "a") as file: file.write(f"+{os.environ['CUDA_VISIBLE_DEVICES']}\\n")
time.sleep(0.3)
with open(study / "devices", "a") as file: file.write(f"-{os.environ['CUDA_VISIBLE_DEVICES']}\\n")
train()
"""
    import os

    study = evaluating_study(tmp_path, code, seeds=[0, 1, 2], evaluate=None)
    codes = runs.run_tasks(study, study.tasks, jobs=2, limits=Limits(gpus=("4", "7")))
    assert set(codes.values()) == {0} and "CUDA_VISIBLE_DEVICES" not in os.environ
    used: set[str] = set()
    lines = (study.folder / "devices").read_text().splitlines()
    assert len(lines) == 6
    for line in lines:
        gpu = line[1:]
        assert (gpu in used) == (line[0] == "-") and gpu in ("4", "7")
        used ^= {gpu}


# ---- evaluations elsewhere


def test_evaluations_wait_for_trainings_of_another_command(tmp_path):
    """One command trains, another evaluates each task when it is done, and leaves out that whose training failed."""
    code = "sys.exit(2) if run.name.endswith('seed1') else train() if sys.argv[3] == 'train' else evaluate()"
    study = evaluating_study(tmp_path, code, seeds=[0, 1])
    calls = []

    def others_train():
        calls.append(None)
        if len(calls) == 3:
            assert starts(study) == []
            trainings = jobs_to_run(study, study.tasks, evaluate=False, alone=False, train=True)
            runs.run_tasks(study, trainings)
        return False

    jobs = jobs_to_run(study, study.tasks, evaluate=True, alone=False)
    codes = runs.run_tasks(study, jobs, 1, others_train, Limits(waits=True))
    assert codes == {"promoe-seed0-evaluation": 0}
    assert starts(study) == ["train promoe-seed0", "train promoe-seed1", "evaluate promoe-seed0"]


def test_an_evaluation_beside_the_trainings_does_not_delay_them(tmp_path):
    code = """
if sys.argv[3] == "train": train(); sys.exit()
while "train promoe-seed1" not in (study / "starts").read_text(): time.sleep(0.02)
evaluate()
"""
    study = evaluating_study(tmp_path, code, seeds=[0, 1])
    codes = runs.run_tasks(study, study.jobs(), 1, limits=Limits(evaluations=1))
    assert set(codes.values()) == {0} and len(codes) == 4


def test_to_wait_without_evaluating_is_refused(tmp_path, capsys):
    study = evaluating_study(tmp_path)
    assert main(["study", "run", str(study.folder), "--wait"]) == 2
    assert "--wait: needs --evaluate" in capsys.readouterr().err


# ---- layouts in the results


def test_the_layouts_of_a_run_are_in_its_row(tmp_path):
    study = finished(tmp_path, recipe(axes={}))
    first, second = study.tasks
    assert row(study, first)["ranks"] is None and row(study, first)["layout"] is None, "of an earlier version"
    single, several = ({"world": n, "tp": 1, "ep": n, "dp": n} for n in (1, 4))
    for task, layouts in ((first, [single]), (second, [single, several, several])):
        (study.run(task) / "environment.json").write_text(json.dumps([{"layout": layout} for layout in layouts]))
    rows = [row(study, task) for task in study.tasks]
    assert [(r["ranks"], r["layout"]) for r in rows] == [(1, "tp1 ep1 dp1"), (4, "tp1 ep1 dp1; tp1 ep4 dp4")]
    assert "Runs have several layouts" in to_markdown(rows, study.recipe, [], ["promoe"])
    assert "several layouts" not in to_markdown(rows[:1], study.recipe, [], ["promoe"])


@pytest.mark.full
def test_a_task_on_two_ranks_is_recorded_as_such(tmp_path, capsys):
    study = plan(tmp_path, recipe(settings=TINY, axes={}, seeds=[0]))
    assert main(["study", "run", str(tmp_path), "--ranks", "2"]) == 0, study.log(study.tasks[0]).read_text()
    assert main(["study", "collect", str(tmp_path)]) == 0
    (line,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (line["ranks"], line["layout"]) == ("2", "tp1 ep1 dp2")
    (start,) = json.loads((study.run(study.tasks[0]) / "environment.json").read_text())
    assert start["launcher"] == "torchrun" and start["layout"]["world"] == 2
