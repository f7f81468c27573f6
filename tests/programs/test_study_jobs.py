"""Evaluations as jobs of a study: their order, what is repeated, and what SLURM is asked for."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_studies import recipe
from support.stand_ins import FOUR, evaluating_study, starts

from megapromoe.cli import main
from megapromoe.studies import runs
from megapromoe.studies.status import job_state
from megapromoe.studies.study import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)


# ---- running


def test_each_training_is_evaluated_when_it_is_done_and_never_again(tmp_path):
    study = evaluating_study(tmp_path)
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}
    names = [task.name for task in study.tasks]
    assert starts(study) == [f"{what} {name}" for name in names for what in ("train", "evaluate")]
    assert not study.missing() and not study.missing_evaluations()
    runs.run_tasks(study, study.jobs())
    assert len(starts(study)) == 4, "nothing again"


def test_a_repeated_evaluation_continues_with_the_missing_steps(tmp_path):
    """It failed after the first checkpoint; the next start is asked for the second alone."""
    code = """
if sys.argv[3] == "train":
    train()
elif not (run / "evaluation.jsonl").exists():
    record(2, 1.0); record(2, 2.0)
    print("megapromoe: a GPU fell off the bus"); sys.exit(1)
else:
    (study / "asked").write_text(" ".join(words("--step"))); evaluate()
"""
    study = evaluating_study(tmp_path, code, seeds=[0])
    codes = runs.run_tasks(study, study.jobs())
    assert codes == {"promoe-seed0": 0, "promoe-seed0-evaluation": 1} and runs.exit_code(codes) == 1
    state = job_state(study, study.jobs()[1], time.time())
    assert (state.state, state.done) == ("failed", 1)
    assert state.remark == "exit code 1: megapromoe: a GPU fell off the bus"
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}
    assert (study.folder / "asked").read_text() == "4"


def test_an_evaluation_that_claims_success_without_its_figures_has_failed(tmp_path):
    study = evaluating_study(tmp_path, "train() if sys.argv[3] == 'train' else None", seeds=[0])
    assert runs.run_tasks(study, study.jobs())["promoe-seed0-evaluation"] == 1
    outcome = study.outcome(study.jobs()[1])
    assert outcome["said"].endswith("evaluation.jsonl lacks results of step 2, 4 that match the recipe")


def test_a_single_task_prints_no_expected_end_of_the_study(tmp_path, capfd):
    study = evaluating_study(tmp_path)
    runs.run_tasks(study, study.tasks[:1])
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith("1 of 1: training promoe-seed0 starts") and first.endswith(
        "; it should end at an unknown time"
    )


def test_images_of_a_training_that_failed_are_not_evaluated(tmp_path, capfd):
    code = "sys.exit(3) if run.name.endswith('seed0') else train() if sys.argv[3] == 'train' else evaluate()"
    study = evaluating_study(tmp_path, code)
    codes = runs.run_tasks(study, study.jobs(), jobs=2)
    assert codes == {"promoe-seed0": 3, "promoe-seed1": 0, "promoe-seed1-evaluation": 0}
    assert "evaluate promoe-seed0" not in starts(study)
    assert "promoe-seed0-evaluation: not started, its training is not done (failed" in capfd.readouterr().err


def test_a_stopped_evaluation_ends_and_is_continued(tmp_path):
    code = """
if sys.argv[3] == "train":
    train()
elif not (study / "go").exists():
    (study / "waits").touch(); time.sleep(60)
else:
    evaluate()
"""
    study = evaluating_study(tmp_path, code, seeds=[0])
    codes = runs.run_tasks(study, study.jobs(), 1, lambda: (study.folder / "waits").exists())
    assert codes["promoe-seed0-evaluation"] == 75 and runs.exit_code(codes) == 75
    assert job_state(study, study.jobs()[1], time.time()).state == "stopped"
    (study.folder / "go").touch()
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}


def test_a_task_of_an_array_trains_or_evaluates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megapromoe.commands.study.evaluate", lambda study, tasks, jobs: None)  # no such checkpoints
    study = evaluating_study(tmp_path)
    assert main(["study", "run", str(study.folder), "--task", "1", "--evaluate"]) == 2
    assert "promoe-seed1 is not trained (not started); train it first: megapromoe study run" in capsys.readouterr().err
    assert main(["study", "run", str(study.folder), "--task", "1"]) == 0
    assert main(["study", "run", str(study.folder), "--task", "1", "--evaluate"]) == 0
    assert starts(study) == ["train promoe-seed1", "evaluate promoe-seed1"]
    assert main(["study", "run", str(study.folder), "--evaluate"]) == 0, "the other is not trained, and left out"
    assert len(starts(study)) == 2
    other = plan(tmp_path / "other", recipe())
    assert main(["study", "run", str(other.folder), "--evaluate"]) == 2
    assert "the recipe has no section `evaluate`" in capsys.readouterr().err


def test_run_prints_what_starts_and_its_expected_end(tmp_path, capfd):
    study = evaluating_study(tmp_path, "time.sleep(0.2); train() if sys.argv[3] == 'train' else evaluate()")
    runs.run_tasks(study, study.jobs())
    lines = capfd.readouterr().err.splitlines()
    run = study.run(study.tasks[0])
    assert lines[0] == (
        f"1 of 4: training promoe-seed0 starts (variant promoe, seed 0, 4 steps, {run});"
        " it should end at an unknown time, the study at an unknown time"
    )
    assert lines[2].startswith("2 of 4: evaluation of promoe-seed0 starts (200 images at guidance 1, 2 of steps 2, 4;")
    when = r"in \d+ s, at \d\d:\d\d"
    # By then a training and an evaluation have ended.
    assert re.fullmatch(rf"3 of 4: training promoe-seed1 .*; it should end {when}, the study {when}", lines[4])
    assert re.fullmatch(r"promoe-seed1-evaluation: done in \d+ s \(4 of 4\)", lines[7])


# ---- SLURM


def submitted(study, tmp_path, monkeypatch, capsys, *words):
    """The lines of a stand-in of sbatch, which numbers jobs from 40 on."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir(exist_ok=True)
    sbatch.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "Submitted batch job 4$(wc -l < {tmp_path}/asked)"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    (tmp_path / "asked").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["study", "submit", str(study.folder), *words]) == 0
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_evaluations_wait_for_the_trainings_of_the_same_numbers(tmp_path, monkeypatch, capsys):
    study = evaluating_study(tmp_path, seeds=[0, 1, 2])
    script = f"{ROOT / 'launchers' / 'scaling_experts.sh'} {study.folder}"
    wait = "--dependency=aftercorr:41 --kill-on-invalid-dep=yes"
    assert submitted(study, tmp_path, monkeypatch, capsys, "--jobs", "2", "--time=5") == [
        f"--array=0-2%2 --time=5 {script}",
        f"--array=0-2%2 --time=5 {wait} {script} --evaluate",
    ]
    assert submitted(study, tmp_path, monkeypatch, capsys, "--dry-run") == []
    assert "--dependency=aftercorr:JOBID" in capsys.readouterr().out
    runs.run_tasks(study, study.tasks[:2])
    runs.run_tasks(study, study.jobs(study.tasks[:1]))
    assert submitted(study, tmp_path, monkeypatch, capsys) == [
        f"--array=2 {script}",
        f"--array=1 {script} --evaluate",
        f"--array=2 {wait} {script} --evaluate",
    ]
    runs.run_tasks(study, study.jobs())
    assert submitted(study, tmp_path, monkeypatch, capsys) == []


def test_without_a_number_of_the_trainings_nothing_waits(tmp_path, monkeypatch, capsys):
    study = evaluating_study(tmp_path)
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["study", "submit", str(study.folder)]) == 2
    assert "printed no job id, which the evaluations need" in capsys.readouterr().err


def test_the_job_script_passes_its_options_on(tmp_path):
    (tmp_path / "study.yaml").touch()
    script = str(ROOT / "launchers" / "scaling_experts.sh")
    env = {**os.environ, "MEGAPROMOE_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, "--dry-run", str(tmp_path), "--evaluate", "--retries=4"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"study run {tmp_path} --task TASK --evaluate --retries 4")


# ---- for real


@pytest.mark.full
def test_a_study_of_digits_evaluates_its_checkpoints_by_the_classifier(tmp_path, capsys, monkeypatch):
    """Without network: the classifier is trained on the digits of scikit-learn."""
    small = FOUR | {"sample.batch": 60, "model.num_experts": 2}
    section = {"num": 120, "guidance": [1.0], "steps": 2, "every": 2, "features": "digits"}
    study = plan(tmp_path / "s", recipe(settings=small, axes={}, seeds=[0], evaluate=section))
    assert main(["study", "run", str(study.folder)]) == 0, study.log(study.jobs()[1]).read_text()
    assert "2 of 2 done, 0 failed" in capsys.readouterr().err
    lines = [json.loads(line) for line in (study.run(study.tasks[0]) / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and not study.missing_evaluations()
    assert main(["study", "collect", str(study.folder), "--draws", "8"]) == 0
    assert main(["study", "plot", str(study.folder), "--draws", "8"]) == 0
    assert (study.folder / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    assert "Fréchet distance (digits classifier)" in (study.folder / "evaluations.csv").read_text()
