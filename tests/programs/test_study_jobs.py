"""Evaluations as jobs of a study: their order, resuming, SLURM, the status, and when it all should end."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small_studies import TINY, recipe
from support.stand_ins import stand_in, starts

from megapromoe.cli import main
from megapromoe.studies import runs
from megapromoe.studies.forecast import Forecast, in_words
from megapromoe.studies.job_processes import flops_of, units
from megapromoe.studies.status import QUIET, job_state, table
from megapromoe.studies.study import plan
from megapromoe.studies.task_locks import lock_task

ROOT = Path(__file__).parents[2]
SECTION = {"num": 200, "guidance": [1.0, 2.0], "steps": 4, "every": 2, "features": "digits"}
FOUR = {key: value for key, value in TINY.items() if key != "train.save_every"} | {"train.steps": 4}


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)


def planned(tmp_path, code="train() if sys.argv[3] == 'train' else evaluate()", **changes):
    made = {"settings": FOUR, "axes": {}, "evaluate": SECTION, "launcher": stand_in(tmp_path, code)}
    return plan(tmp_path / "s", recipe(**(made | changes)))


# ---- running


def test_each_training_is_evaluated_when_it_is_done_and_never_again(tmp_path):
    study = planned(tmp_path)
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}
    names = [task.name for task in study.tasks]
    assert starts(study) == [f"{what} {name}" for name in names for what in ("train", "evaluate")]
    assert not study.missing() and not study.missing_evaluations()
    runs.run_tasks(study, study.jobs())
    assert len(starts(study)) == 4, "nothing again"


def test_a_repeated_evaluation_goes_on_with_the_steps_that_are_missing(tmp_path):
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
    study = planned(tmp_path, code, seeds=[0])
    codes = runs.run_tasks(study, study.jobs())
    assert codes == {"promoe-seed0": 0, "promoe-seed0-evaluation": 1} and runs.exit_code(codes) == 1
    state = job_state(study, study.jobs()[1], time.time())
    assert (state.state, state.done) == ("failed", 1)
    assert state.remark == "exit code 1: megapromoe: a GPU fell off the bus"
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}
    assert (study.folder / "asked").read_text() == "4"


def test_an_evaluation_that_claims_success_without_its_figures_has_failed(tmp_path):
    study = planned(tmp_path, "train() if sys.argv[3] == 'train' else None", seeds=[0])
    assert runs.run_tasks(study, study.jobs())["promoe-seed0-evaluation"] == 1


def test_images_of_a_training_that_failed_are_not_evaluated(tmp_path, capfd):
    code = "sys.exit(3) if run.name.endswith('seed0') else train() if sys.argv[3] == 'train' else evaluate()"
    study = planned(tmp_path, code)
    codes = runs.run_tasks(study, study.jobs(), jobs=2)
    assert codes == {"promoe-seed0": 3, "promoe-seed1": 0, "promoe-seed1-evaluation": 0}
    assert "evaluate promoe-seed0" not in starts(study)
    assert "promoe-seed0-evaluation: not started, its training is not done (failed" in capfd.readouterr().err


def test_asked_to_stop_an_evaluation_ends_and_is_taken_up_again(tmp_path):
    code = """
if sys.argv[3] == "train":
    train()
elif not (study / "go").exists():
    (study / "waits").touch(); time.sleep(60)
else:
    evaluate()
"""
    study = planned(tmp_path, code, seeds=[0])
    codes = runs.run_tasks(study, study.jobs(), 1, lambda: (study.folder / "waits").exists())
    assert codes["promoe-seed0-evaluation"] == 75 and runs.exit_code(codes) == 75
    assert job_state(study, study.jobs()[1], time.time()).state == "stopped"
    (study.folder / "go").touch()
    assert set(runs.run_tasks(study, study.jobs()).values()) == {0}


def test_a_task_of_an_array_trains_or_evaluates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megapromoe.commands.study.evaluate", lambda study, tasks: None)  # no such checkpoints
    study = planned(tmp_path)
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


def test_run_says_what_starts_and_when_it_should_end(tmp_path, capfd):
    study = planned(tmp_path, "time.sleep(0.2); train() if sys.argv[3] == 'train' else evaluate()")
    runs.run_tasks(study, study.jobs())
    lines = capfd.readouterr().err.splitlines()
    run = study.run(study.tasks[0])
    assert lines[0] == (
        f"1 of 4: training promoe-seed0 starts (variant promoe, seed 0, 4 steps, {run});"
        " it should end unknown, the study unknown"
    )
    assert lines[2].startswith("2 of 4: evaluation of promoe-seed0 starts (200 images at guidance 1, 2 of steps 2, 4;")
    when = r"in \d+ s, at \d\d:\d\d"
    # By then a training and an evaluation have ended.
    assert re.fullmatch(rf"3 of 4: training promoe-seed1 .*; it should end {when}, the study {when}", lines[4])
    assert re.fullmatch(r"promoe-seed1-evaluation: done in \d+ s \(4 of 4\)", lines[7])


# ---- the forecast


class Files:
    """A study's files, as far as a forecast looks at them."""

    def __init__(self, study):
        self.study, self.outcomes, self.logged = study, {}, {}
        self.jobs, self.run = study.jobs, study.run

    def outcome(self, job):
        return self.outcomes.get(job.name)

    def last_line(self, job):
        return self.logged.get(job.name, (0, None))

    def steps_saved(self, task):
        return 0


def running(job, since, done_before=0):
    return SimpleNamespace(job=job, since=since, since_epoch=1e9 + since, done_before=done_before)


def test_a_forecast_is_unknown_before_anything_is_measured(tmp_path):
    study = Files(planned(tmp_path))
    training, evaluation, *_ = study.jobs()
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    one = running(training, 90.0)
    assert forecast.job_left(one) is None and forecast.all_left([one], [evaluation]) is None
    assert forecast.all_left([], []) == 0
    assert in_words(None, datetime(2026, 1, 1)) == "unknown"


def test_a_running_training_tells_its_end_and_that_of_the_trainings_behind_it(tmp_path):
    study = Files(planned(tmp_path, evaluate=None))
    first, second = study.jobs()
    study.logged[first.name] = (1, 1e9 + 95)
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    one = running(first, 90.0)  # 1 of 4 steps in 10 s
    assert forecast.job_left(one) == pytest.approx(30)
    assert forecast.all_left([one], [second]) == pytest.approx(30 + 40)
    study.logged[first.name] = (3, 1e9 + 80)
    assert forecast.job_left(one) is None, "these lines are of an earlier start"


def test_work_before_this_start_is_no_speed(tmp_path):
    study = Files(planned(tmp_path, evaluate=None))
    first, _ = study.jobs()
    study.logged[first.name] = (3, 1e9 + 95)
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    assert forecast.job_left(running(first, 90.0, done_before=2)) == pytest.approx(10), "one step in ten seconds"


def test_jobs_that_ended_tell_of_the_others_and_several_run_at_once(tmp_path):
    study = Files(planned(tmp_path, seeds=[0, 1, 2, 3]))
    jobs = study.jobs()
    training, evaluation, *_ = jobs
    study.outcomes[training.name] = {"code": 0, "seconds": 40.0, "flops": flops_of(training, 4)}
    waiting = [job for job in jobs if job not in (training, evaluation)]
    assert Forecast(study, 1).all_left([], waiting) is None, "no evaluation has ended yet"
    study.outcomes[evaluation.name] = {"code": 0, "seconds": 20.0, "flops": flops_of(evaluation, units(evaluation))}
    assert Forecast(study, 1).all_left([], waiting) == pytest.approx(3 * 60)
    assert Forecast(study, 3).all_left([], waiting) == pytest.approx(60)
    assert Forecast(study, 99).all_left([], waiting) == pytest.approx(40), "no job ends before itself"
    study.outcomes[training.name] = {"code": 0, "seconds": 40.0}  # of an earlier version
    assert Forecast(study, 1).all_left([], waiting) is None


def test_a_moment_in_words():
    now = datetime(2026, 3, 1, 23, 50)
    assert in_words(300, now) == "in 5 min, at 23:55"
    assert in_words(1200, now) == "in 20 min, at 02 Mar 00:10"


# ---- the status


def states(study, now=None):
    return {s.job.name: (s.state, s.done) for s in (job_state(study, job, now or time.time()) for job in study.jobs())}


def test_the_states_of_a_study(tmp_path, capsys):
    code = "sys.exit(3) if run.name.endswith('seed0') else train() if sys.argv[3] == 'train' else evaluate()"
    study = planned(tmp_path, code, seeds=[0, 1, 2])
    assert set(states(study).values()) == {("waiting", 0)}
    runs.run_tasks(study, study.jobs(study.tasks[:2]))
    assert states(study) == {
        "promoe-seed0": ("failed", 0), "promoe-seed0-evaluation": ("waiting", 0),
        "promoe-seed1": ("done", 4), "promoe-seed1-evaluation": ("done", 2),
        "promoe-seed2": ("waiting", 0), "promoe-seed2-evaluation": ("waiting", 0),
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}
    capsys.readouterr()
    assert main(["study", "status", str(study.folder)]) == 0, "whatever the states"
    lines = capsys.readouterr().out.splitlines()
    assert before == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}, "it only reads"
    assert lines[0].split() == ["task", "job", "state", "done", "last", "line", "remark"]
    assert re.match(r"0 +promoe-seed0 +failed +0 of 4 steps +\d+ s ago +exit code 3", lines[1])
    assert re.match(r"1 +promoe-seed1-evaluation +done +2 of 2 checkpoints +\d+ s ago$", lines[4])
    assert lines[-1] == "2 done, 3 waiting, 1 failed; 4 of 12 training steps"


def begun(study, job, host, logged=3):
    """The files of a job that was started on a machine and has not ended."""
    for path in (study.log(job), study.lock_file(job), study.run(job) / "metrics.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
    study.log(job).write_text("$ ...\n")
    study.lock_file(job).write_text(f"pid 1 on {host}\n")
    (study.run(job) / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(1, logged + 1)))


def test_a_job_that_some_process_holds_runs(tmp_path):
    study = planned(tmp_path)
    job = study.tasks[0]
    with lock_task(study, job):
        begun(study, job, "pid 1 on nowhere")
        study.lock_file(job).write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
        later = time.time() + 120
        state = job_state(study, job, later)
        assert (state.state, state.done, round(state.age)) == ("running", 3, 120)
        assert f"pid {os.getpid()}" in state.remark and "2 min ago" in table(study, [state])
    assert job_state(study, job, time.time()).state == "failed", "of this machine, and nobody holds it"
    assert "killed together with the command" in job_state(study, job, time.time()).remark


def test_a_job_of_another_machine_whose_lock_is_not_seen_is_judged_by_its_last_line(tmp_path):
    study = planned(tmp_path)
    job = study.tasks[0]
    begun(study, job, "node17")
    now = time.time()
    state = job_state(study, job, now)
    assert (state.state, state.done) == ("running", 3) and "judged by its last line" in state.remark
    assert job_state(study, job, now + QUIET + 60).state == "failed"


def test_the_status_disturbs_no_run(tmp_path):
    study = planned(tmp_path)
    begun(study, study.tasks[0], "node17")
    job_state(study, study.tasks[0], time.time())
    with lock_task(study, study.tasks[0]) as lock:
        assert lock is not None


def test_help_teaches_the_states(capsys):
    for words, parts in (
        (["status"], ["running", "waiting", "stopped", "failed", "The exit code is 0"]),
        (["run"], ["--evaluate", "`evaluate`"]),
        (["submit"], ["aftercorr"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(["study", *words, "--help"])
        said = capsys.readouterr().out
        assert left.value.code == 0 and all(part in said for part in parts)


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
    study = planned(tmp_path, seeds=[0, 1, 2])
    script = f"{ROOT / 'launchers' / 'scaling_experts.sh'} {study.folder}"
    wait = "--dependency=aftercorr:41 --kill-on-invalid-dep=yes"
    assert submitted(study, tmp_path, monkeypatch, capsys, "--at-once", "2", "--time=5") == [
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
    study = planned(tmp_path)
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["study", "submit", str(study.folder)]) == 2
    assert "printed no number of a job for evaluations to wait for" in capsys.readouterr().err


def test_the_job_script_hands_on_what_it_evaluates(tmp_path):
    (tmp_path / "study.yaml").touch()
    script = str(ROOT / "launchers" / "scaling_experts.sh")
    env = {**os.environ, "MEGAPROMOE_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, "--dry-run", str(tmp_path), "--evaluate"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"study run {tmp_path} --task TASK --evaluate")


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
