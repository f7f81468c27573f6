"""The losses of a study's runs on fixed draws, one after the other and several at the same time."""

import json
import queue
import signal
from pathlib import Path

import pytest
from support.golden_states import random_state
from support.small_studies import recipe

from megapromoe.conversion.exports import export
from megapromoe.studies.collect import _begin, evaluate, evaluated
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.study import Study, plan

DRAWS = 32


def trained(folder: Path) -> Study:
    """A study of models with 2 and with 4 experts, of random weights."""
    study = plan(folder, recipe(seeds=[0]))
    for task in study.tasks:
        export(random_state(task.config), study.run(task), "ours")
    return study


def losses(study: Study) -> list[float]:
    return [json.loads(study.loss_file(task).read_text())["loss"] for task in study.tasks]


@pytest.mark.full
def test_several_at_the_same_time_are_the_same(tmp_path):
    alone, together = (trained(tmp_path / name) for name in ("alone", "together"))
    evaluate(alone, alone.tasks, DRAWS)
    evaluate(together, together.tasks, DRAWS, jobs=2)
    assert losses(alone) == losses(together) and len(set(losses(alone))) == 2


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_checkpoint_that_cannot_be_used_is_named_after_the_others(jobs, tmp_path):
    study = trained(tmp_path)
    damaged, good = study.tasks
    (shard,) = study.run(damaged).rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(StudyError) as raised:
        evaluate(study, study.tasks, DRAWS, jobs)
    (problem,) = raised.value.violations
    assert problem.startswith(f"{damaged.name}: ") and shard.name in problem
    assert evaluated(study, good, DRAWS) and not evaluated(study, damaged, DRAWS)


@pytest.mark.full
def test_a_killed_process_is_reported_with_the_remedy(tmp_path, monkeypatch):
    study = trained(tmp_path / "study")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif '--multiprocessing-fork' in sys.argv: os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StudyError, match="--jobs 2: a process was killed, perhaps because memory was full; take fewer"):
        evaluate(study, study.tasks, DRAWS, jobs=2)


def test_processes_take_different_gpus(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    handler = signal.getsignal(signal.SIGINT)
    numbers: queue.Queue[int] = queue.Queue()
    for number in range(3):
        numbers.put(number)
        _begin(numbers)
    signal.signal(signal.SIGINT, handler)
    assert chosen == [0, 1, 0]
