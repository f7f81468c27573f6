"""How far a study is and when it should end, from its files."""

import os
import re
import socket
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from support.stand_ins import evaluating_study

from megapromoe.cli import main
from megapromoe.studies import runs
from megapromoe.studies.forecast import Forecast, in_words
from megapromoe.studies.job_processes import flops_of, units
from megapromoe.studies.status import QUIET, job_state, table
from megapromoe.studies.task_locks import lock_task


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)


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
    study = Files(evaluating_study(tmp_path))
    training, evaluation, *_ = study.jobs()
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    job = running(training, 90.0)
    assert forecast.job_left(job) is None and forecast.all_left([job], [evaluation]) is None
    assert forecast.all_left([], []) == 0
    assert in_words(None, datetime(2026, 1, 1)) == "at an unknown time"


def test_a_running_training_shows_its_end_and_that_of_waiting_trainings(tmp_path):
    study = Files(evaluating_study(tmp_path, evaluate=None))
    first, second = study.jobs()
    study.logged[first.name] = (1, 1e9 + 95)
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    job = running(first, 90.0)  # 1 of 4 steps in 10 s
    assert forecast.job_left(job) == pytest.approx(30)
    assert forecast.all_left([job], [second]) == pytest.approx(30 + 40)
    study.logged[first.name] = (3, 1e9 + 80)
    assert forecast.job_left(job) is None, "these lines are of an earlier start"


def test_work_before_this_start_is_no_speed(tmp_path):
    study = Files(evaluating_study(tmp_path, evaluate=None))
    first, _ = study.jobs()
    study.logged[first.name] = (3, 1e9 + 95)
    forecast = Forecast(study, 1, clock=lambda: 100.0)
    assert forecast.job_left(running(first, 90.0, done_before=2)) == pytest.approx(10), "one step in ten seconds"


def test_finished_jobs_predict_the_others_when_several_run_together(tmp_path):
    study = Files(evaluating_study(tmp_path, seeds=[0, 1, 2, 3]))
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
    study = evaluating_study(tmp_path, code, seeds=[0, 1, 2])
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
    study = evaluating_study(tmp_path)
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
    study = evaluating_study(tmp_path)
    job = study.tasks[0]
    begun(study, job, "node17")
    now = time.time()
    state = job_state(study, job, now)
    assert (state.state, state.done) == ("running", 3) and "according to its last line" in state.remark
    assert job_state(study, job, now + QUIET + 60).state == "failed"


def test_the_status_disturbs_no_run(tmp_path):
    study = evaluating_study(tmp_path)
    begun(study, study.tasks[0], "node17")
    job_state(study, study.tasks[0], time.time())
    with lock_task(study, study.tasks[0]) as lock:
        assert lock is not None


def test_help_explains_the_states(capsys):
    for words, parts in (
        (["status"], ["running", "waiting", "stopped", "failed", "The exit code is 0"]),
        (["run"], ["--evaluate", "`evaluate`"]),
        (["submit"], ["aftercorr"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(["study", *words, "--help"])
        output = capsys.readouterr().out
        assert left.value.code == 0 and all(part in output for part in parts)
