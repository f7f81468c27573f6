"""Weights & Biases: values with their steps, one run for all starts, one warning for a failure, which ends nothing."""

import json
import logging
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support import stub_wandb

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.training import metrics, wandb_run
from megapromoe.training.dry_run import examine_start
from megapromoe.training.metrics import Metrics
from megapromoe.training.wandb_run import WandbUnavailable, check_installed

CONFIG = resolve("digits", overrides=["train.wandb=team/moe"])  # MoE blocks 1 and 3, 4 experts
LAYERS = {"expert_load": torch.tensor([[4, 2, 2, 0], [2, 2, 2, 2]]), "gate": torch.tensor([0.25, 0.5])}
PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "environment.json").write_text('[{"run": "0123456789ab"}, {"started": "later"}]')
    return tmp_path


def start(folder, *steps: int, first_step: int = 0, config=CONFIG) -> None:
    metrics = Metrics(folder, config, 100, first_step, terminal=False)
    for step in steps:
        metrics.log(step, {"total_loss": step / 2, "mfu": None}, LAYERS)
    metrics.samples(steps[-1], PICTURE)
    metrics.close()
    metrics.close()


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # undone afterwards
    return tmp_path / "notes"


def test_all_starts_continue_one_run(folder, notes, monkeypatch):
    monkeypatch.setattr(metrics, "FIRST_HEAT_MAP", 0.0)
    stub_wandb.install(notes)
    start(folder, 10, 20)
    start(folder, 20, 30, first_step=10)
    calls = stub_wandb.read(notes)
    inits = [content for name, content in calls if name == "init"]
    assert [(i["entity"], i["project"], i["id"], i["resume"]) for i in inits] == [
        ("team", "moe", "0123456789ab", "allow")
    ] * 2
    assert inits[0]["config"]["model"]["num_experts"] == 4 and inits[0]["dir"] == str(folder)
    assert calls.count(("define_metric", ["*", "step"])) == 2 and [n for n, _ in calls].count("finish") == 2
    logged = [content for name, content in calls if name == "log"]
    assert [content["step"] for content in logged] == [10, 20, 20, 20, 30, 30]
    first = {"step": 10, "total_loss": 5.0, "gate/block 1": 0.25, "gate/block 3": 0.5}
    assert logged[0] == first | {"expert_load": logged[0]["expert_load"]} and "picture" in logged[0]["expert_load"]
    assert logged[2] == {"step": 20, "samples": "picture (8, 8, 3)"}


@pytest.mark.parametrize(
    "place, word", [("init", "started"), ("log", "written"), ("finish", "not all values were sent")]
)
def test_a_failure_is_one_warning_and_the_other_logs_go_on(place, word, folder, notes, caplog):
    stub_wandb.install(notes, fails_in=place)
    start(folder, 10, 20, 30)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and word in warnings[0] and f"no network in {place}" in warnings[0]
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [10, 20, 30]
    called = [name for name, _ in stub_wandb.read(notes)]
    assert called.count(place) == 1, "it is not used again"


def test_an_end_that_takes_long_is_not_awaited(folder, notes, caplog, monkeypatch):
    import threading

    ended = threading.Event()
    module = stub_wandb.install(notes)
    run = module.init()
    run.finish = ended.wait
    module.init = lambda **settings: run
    monkeypatch.setattr(wandb_run, "END_SECONDS", 0.05)
    start(folder, 10)
    ended.set()
    assert "not all values were sent (0.05 s are over); send them by `wandb sync`" in caplog.text


def test_without_the_library_a_start_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    check_installed("")
    with pytest.raises(WandbUnavailable, match="pip install 'megapromoe.wandb.', or set train.wandb= to train without"):
        check_installed("moe")
    refused = examine_start(CONFIG, tmp_path / "run").refused
    assert refused is not None and "train.wandb = 'team/moe': wandb is not installed" in str(refused)
    assert examine_start(resolve("digits"), tmp_path / "run").refused is None


def test_a_folder_named_wandb_is_not_the_library(tmp_path, monkeypatch):
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WandbUnavailable):
        check_installed("moe")


def test_no_other_run_touches_it(folder, notes):
    start(folder, 10, config=resolve("digits"))
    assert not notes.exists()


@pytest.mark.parametrize("project", ["a b", "a/b/c", "/moe", "team/", "projèt"])
def test_wrong_projects_are_refused(project):
    with pytest.raises(ConfigError, match="train.wandb = .*must be PROJECT or ENTITY/PROJECT"):
        resolve("digits", overrides=[f"train.wandb={project}"])


@pytest.mark.parametrize(
    "steps, rule",
    [
        *(
            (text, "must be FROM:TO, two step numbers from 1")
            for text in ("5", "0:3", "a:b", "5:4", "1:2:3", "-1:2", ":", "'1:2'", "١:٢")
        ),
        ("499:501", "must end at step 500, the last one .train.steps., or before"),
        ("1:101", "must have at most 100 steps, not 101"),
    ],
)
def test_wrong_ranges_of_profiled_steps_are_refused(steps, rule):
    with pytest.raises(ConfigError, match=f"train.profile = .*{rule}"):
        resolve("digits", overrides=[f"train.profile={steps}"])


@pytest.mark.parametrize("steps", ["5:6", "1:30", "99:100", "7:7"])
def test_ranges_survive_yaml(steps, tmp_path):
    config = resolve("digits", overrides=[f"train.profile={steps}"])
    first, last = map(int, steps.split(":"))
    assert config.train.profiled_steps == range(first, last + 1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolve(file=tmp_path / "config.yaml") == config


@pytest.mark.full
def test_the_library_itself_works_without_a_network(folder, monkeypatch):
    """Two starts in offline mode leave a file each, of one run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(folder, 10, 20)
    start(folder, 30, first_step=20)
    files = sorted((folder / "wandb").glob("offline-run-*/run-0123456789ab.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 1000 for file in files)
