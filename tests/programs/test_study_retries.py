"""Failed jobs of a study: which start again, how often, and what is recorded of them."""

import json
import signal
import time

import pytest
from support.small_studies import recipe
from support.stand_ins import evaluating_study
from support.stand_ins import training_stand_in as stand_in

from megapromoe.errors import ExitCode
from megapromoe.studies import runs
from megapromoe.studies.attempts import attempts_of, failures_in_a_row, in_words, record_end, record_start
from megapromoe.studies.causes import (
    CAUSES,
    DISK_FULL,
    DIVERGED,
    FAILED,
    HUNG,
    INCOMPLETE,
    KILLED,
    MISCONFIGURED,
    NODE_FAILED,
    OUT_OF_MEMORY,
    PREEMPTED,
    cause_of,
)
from megapromoe.studies.runs import Limits
from megapromoe.studies.status import job_state
from megapromoe.studies.study import open_study, plan

# Counts its starts; the start of each number ends as the list says, the others save the last step.
ENDS = """
count = len(list(run.parent.parent.glob("start-*")))
(run.parent.parent / f"start-{{count}}").touch()
ends = {ends}
if count < len(ends):
    end, step = ends[count]
    if step: save(step)
    if isinstance(end, str): print(end); sys.exit(1)
    if end < 0: os.kill(os.getpid(), -end)
    sys.exit(end)
save(3)
"""


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.02)


def study_that_ends(tmp_path, *ends):
    """A study of one task, whose starts end by these (exit code or error message, saved step)."""
    code = ENDS.format(ends=list(ends))
    return plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, code)))


def starts(study):
    return len(list(study.folder.glob("start-*")))


def retry(study, retries=2):
    return runs.run_tasks(study, study.tasks, limits=Limits(retries=retries))["promoe-seed0"]


TORCHRUN = """\
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 4242)
"""


@pytest.mark.parametrize(
    "code, reason, output, diverged, cause",
    [
        (ExitCode.HUNG, "megapromoe: rank 1: no progress for 60 s", "", False, HUNG),
        (ExitCode.STOPPED, "", "", False, PREEMPTED),
        (-signal.SIGKILL, "", "", False, KILLED),
        (137, "", "", False, KILLED),
        (143, "", "", False, KILLED),
        (ExitCode.OUTPUT_CLOSED, "", "", False, FAILED),
        (-signal.SIGKILL, "", "slurmstepd: error: Detected 1 oom_kill event", False, OUT_OF_MEMORY),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out", False, OUT_OF_MEMORY),
        (1, "megapromoe: x: No space left on device", "", False, DISK_FULL),
        (1, "megapromoe: steps in a row had no usable gradient", "", True, DIVERGED),
        (ExitCode.MISCONFIGURED, "megapromoe: 1 problem in the configuration", "", True, MISCONFIGURED),
        (127, "no-such-launcher: No such file or directory", "", False, MISCONFIGURED),
        (1, "the process that holds the job's store (rank 0) does not answer", "", False, NODE_FAILED),
        (1, "rank 0 on a has waited 60 s at b:1 for 1 of 2 ranks: 1", "", False, NODE_FAILED),
        (1, "ValueError: a bug", "", False, FAILED),
        (3, "", "", False, FAILED),
        (0, "", "", False, INCOMPLETE),
        (1, "", TORCHRUN.format(76), False, HUNG),
        (1, "", TORCHRUN.format(-9), False, KILLED),
        (1, "", TORCHRUN.format(2), False, MISCONFIGURED),
        (1, "", TORCHRUN.format(1), True, DIVERGED),
    ],
)
def test_the_cause_of_an_end(code, reason, output, diverged, cause):
    assert cause_of(code, reason, output, diverged) is cause


def test_only_causes_outside_a_job_can_pass():
    assert {cause.name for cause in CAUSES.values() if cause.passes} == {
        HUNG.name, PREEMPTED.name, KILLED.name, NODE_FAILED.name,
    }  # fmt: skip


def test_what_can_pass_starts_again_until_it_is_done(tmp_path, capfd):
    study = study_that_ends(tmp_path, (76, 0), (-9, 0), (75, 1))
    assert retry(study) == 0 and starts(study) == 4
    words = capfd.readouterr().err
    assert "failed with exit code 76 (a rank hung) after" in words and "starts again, retry 1 of 2" in words
    assert "stopped from outside, and saved (exit code 75); starts again, retry 1 of 2" in words, "it had progress"
    attempts = attempts_of(study, study.tasks[0])
    assert [(a.code, a.done) for a in attempts] == [(76, 0), (-9, 0), (75, 1), (0, 3)]
    state = job_state(study, study.tasks[0], time.time())
    causes = "a rank hung, killed by a signal, stopped from outside, and saved"
    assert (state.state, state.remark) == ("done", f"4 attempts: {causes}")


@pytest.mark.parametrize("end", [2, 1, "megapromoe: a: No space left on device"])
def test_what_cannot_pass_does_not_start_again(end, tmp_path):
    study = study_that_ends(tmp_path, (end, 0))
    assert retry(study) == (end if isinstance(end, int) else 1) and starts(study) == 1


def test_a_run_that_diverged_does_not_start_again(tmp_path):
    code = '(run / "checkpoints").mkdir(parents=True); (run / "diverged.txt").write_text("NaN"); sys.exit(1)'
    study = plan(tmp_path / "s", recipe(seeds=[0], axes={}, launcher=stand_in(tmp_path, code)))
    assert retry(study) == 1 and len(attempts_of(study, study.tasks[0])) == 1
    assert job_state(study, study.tasks[0], time.time()).remark.startswith("exit code 1 (diverged)")


def test_the_limit_holds_over_commands(tmp_path):
    """The first command uses all retries; a repeated one starts the job once, and again only after progress."""
    study = study_that_ends(tmp_path, (76, 1), (76, 1), (76, 1), (76, 2))
    assert retry(study, retries=1) == 76 and starts(study) == 2
    state = job_state(study, study.tasks[0], time.time())
    assert state.state == "failed" and "(a rank hung)" in state.remark
    assert state.remark.endswith("; 2 attempts: a rank hung (2)")
    again = open_study(study.folder)
    assert retry(again, retries=1) == 76 and starts(study) == 3
    assert retry(again, retries=1) == 0 and starts(study) == 5, "its step 2 was progress"
    outcome = json.loads(study.outcome_file(study.tasks[0]).read_text())
    assert outcome["code"] == 0 and outcome["cause"] == ""


def test_a_start_whose_command_was_killed_is_no_failure(tmp_path):
    study = study_that_ends(tmp_path)
    (task,) = study.tasks
    for code, cause, done in ((76, HUNG, 1), (76, HUNG, 1), (2, MISCONFIGURED, 1), (76, HUNG, 1)):
        record_start(study, task)
        record_end(study, task, code, cause, done)
    record_start(study, task)
    with open(study.attempts_file(task), "a") as file:
        file.write('{"ended": "2026-01-')  # the command was killed while it wrote the line
    attempts = attempts_of(study, task)
    assert len(attempts) == 5 and attempts[-1].code is None
    assert failures_in_a_row(attempts, done=1) == 1 and failures_in_a_row(attempts, done=2) == 0
    assert in_words(attempts) == f"5 attempts: a rank hung (3), {MISCONFIGURED.name}"
    assert in_words(attempts[:1]) == ""


def test_a_failed_job_keeps_its_lock_until_it_starts_again(tmp_path, monkeypatch):
    """Another command must not take the failure for the end."""
    study = study_that_ends(tmp_path, (76, 0))
    held = []
    begin = runs.start

    def start(study, job, lock, gpus):
        held.append(not lock.closed)
        return begin(study, job, lock, gpus)

    monkeypatch.setattr(runs, "start", start)
    locks = []
    monkeypatch.setattr(runs, "lock_task", lambda *words: locks.append(words) or lock_task(*words))
    from megapromoe.studies.task_locks import lock_task

    assert retry(study) == 0 and held == [True, True] and len(locks) == 1


def test_an_evaluation_is_retried_alone(tmp_path):
    code = """
if sys.argv[3] == "train": train()
elif not (run / "evaluation.jsonl").exists(): record(2, 1.0); record(2, 2.0); sys.exit(76)
else: evaluate()
"""
    study = evaluating_study(tmp_path, code, seeds=[0])
    codes = runs.run_tasks(study, study.jobs(), limits=Limits(retries=1))
    assert set(codes.values()) == {0}
    assert [len(attempts_of(study, job)) for job in study.jobs()] == [1, 2]
