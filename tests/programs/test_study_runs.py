"""Trainings of a study: failures, stops, several commands at once, and how their states are called."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.small_studies import recipe
from support.stand_ins import command_of, wait_until
from support.stand_ins import training_stand_in as stand_in

from megapromoe.studies import runs
from megapromoe.studies.study import plan
from megapromoe.studies.task_locks import lock_task

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


def test_a_missing_launcher_is_reported(tmp_path):
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


def test_when_stopped_running_tasks_save_and_waiting_ones_do_not_start(tmp_path):
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


def test_steps_of_an_earlier_start_do_not_count_for_the_rate(tmp_path, monkeypatch):
    shown = []

    class Recorded(runs.Progress):
        def __init__(self, total, *names, done, **more):
            super().__init__(total, *names, done=done, **more)
            shown.append((done, total))

        def close(self):
            super().close()
            shown.append((self.done, self.total))

    monkeypatch.setattr(runs, "Progress", Recorded)
    code = (
        'run.mkdir(parents=True, exist_ok=True)\nopen(run / "metrics.jsonl", "a").write(\'{"step": 3}\\n\')\nsave(3)\n'
    )
    study = plan(tmp_path / "s", recipe(seeds=[0], launcher=stand_in(tmp_path, code)))
    first, second = study.tasks
    study.run(first).mkdir(parents=True)
    (study.run(first) / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert set(runs.run_tasks(study, study.tasks).values()) == {0}
    assert shown == [(2, 6), (6, 6)]


def test_two_commands_at_once_train_each_task_once_and_report_no_failure(tmp_path):
    study = plan(tmp_path / "s", recipe(launcher=stand_in(tmp_path, ALONE)))
    words = [sys.executable, "-c", ONE_COMMAND, str(study.folder), "2"]
    commands = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [command.communicate(timeout=120) for command in commands]
    assert [out for out, _ in ends] == ["[0]\n", "[0]\n"], ends
    assert starts(study) == sorted(task.name for task in study.tasks)
    assert "is trained by another command (pid" in ends[0][1] + ends[1][1]


@pytest.mark.parametrize("code, result, count", [(3, 3, 0), (75, 0, 1), (None, 0, 1)])
def test_the_outcome_reported_by_another_command_is_kept(code, result, count, tmp_path, capsys, monkeypatch):
    """It failed: that is the task's end. It was stopped, or killed before it could say anything: trained here."""
    monkeypatch.setattr(runs, "POLL", 0.02)
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, ALONE)))
    (task,) = study.tasks
    study.outcome_file(task).parent.mkdir()
    study.outcome_file(task).write_text(json.dumps({"code": 9, "said": "of an earlier start"}))
    lock, calls = lock_task(study, task), []

    def stop_requested():
        calls.append(None)
        if len(calls) == 3:
            if code is not None:
                study.outcome_file(task).write_text(json.dumps({"code": code, "said": "of another command"}))
            lock.close()
        return False

    assert runs.run_tasks(study, study.tasks, 1, stop_requested) == {task.name: result}
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

    def stop_requested():
        calls.append(None)
        if len(calls) == 3:
            assert not study.done(study.tasks[0]) and starts(study) == [study.tasks[0].name]
            (study.folder / "go").touch()
        return False

    monkeypatch.setattr(runs, "POLL", 0.02)
    assert set(runs.run_tasks(study, study.tasks, 1, stop_requested).values()) == {0}
    assert len(starts(study)) == 1 and len(calls) >= 3


def test_a_stopped_command_does_not_wait_for_others(tmp_path):
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
    assert (
        "the file system has no locks (No locks available); run this task with only one command at a time"
        in caplog.text
    )


def test_a_task_killed_by_a_signal_is_reported(tmp_path, capfd):
    code = "os.kill(os.getpid(), signal.SIGKILL)"
    study = plan(tmp_path / "s", recipe(seeds=[0], launcher=stand_in(tmp_path, code)))
    runs.run_tasks(study, study.tasks[:1])
    first, second = study.tasks
    assert study.state(first) == "killed by SIGKILL, none of 3 steps saved"
    assert study.state(second) == "not started"
    assert "promoe-e2-seed0: killed by SIGKILL after" in capfd.readouterr().err


def test_a_task_killed_together_with_its_program_is_reported(tmp_path):
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
    assert study.state(study.tasks[0]).startswith("killed together with the command that started it")
    assert study.state(study.tasks[0]).endswith("none of 3 steps saved, 2 logged")


def test_a_task_in_training_is_shown_with_its_process(tmp_path):
    from megapromoe.checkpoint.run_directory import RunDirectory

    study = plan(tmp_path / "s", recipe(seeds=[0]))
    task = study.tasks[0]
    with RunDirectory.open(study.run(task), task.config, 1):
        assert study.state(task).startswith(f"in training (pid {os.getpid()} on ")
    assert "in training" not in study.state(task)
