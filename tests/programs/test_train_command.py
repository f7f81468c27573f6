"""`megapromoe train`: the resolved config, --dry-run, and the data of large presets."""

import os
import signal
import threading
import time

import pytest
import yaml
from support.latent_folders import Arrays, write

from megapromoe import cli
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment, LaunchError
from megapromoe.planning.cost import parameters


def test_train_passes_the_resolved_config_on(trained, tmp_path):
    line = ["train", "train.lr=1e-2", "--run-dir", str(tmp_path), "model.depth=2"]
    assert cli.main(line) == 0
    config = resolve("digits", overrides=["train.lr=1e-2", "model.depth=2"])
    assert trained == [(config, tmp_path, LaunchEnvironment("python"), None, (), None)]
    assert cli.main([*line, "--step", "7", "--allow", "data.seed", "--allow", "train.seed"]) == 0
    assert trained[1][3:] == (7, ("data.seed", "train.seed"), None)


def test_the_option_that_the_deepspeed_launcher_adds_is_accepted(trained, tmp_path):
    assert cli.main(["--local_rank=1", "train", "--run-dir", str(tmp_path)]) == 0
    assert trained


def test_a_config_file_replaces_the_default_preset(trained, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {source: synthetic}\n")
    assert cli.main(["train", "--run-dir", str(tmp_path), "--config", str(file)]) == 0
    assert trained[0][0] == resolve(file=file)


def test_train_checks_the_ranks_of_the_launcher(trained, monkeypatch, capsys):
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", world=3))
    assert cli.main(["train", "--run-dir", "x", "parallel.tp=2"]) == 2
    errors = capsys.readouterr().err
    assert "parallel.tp = 2: must divide the 3 ranks" in errors and "--run-dir" not in errors
    assert not trained


def test_other_ranks_leave_a_config_error_to_rank_0(trained, monkeypatch, capsys):
    """They wait, because launchers end all ranks with the first that fails."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", rank=1, world=2))
    monkeypatch.setattr(cli, "GRACE", 0.3)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests keep their handler
    start = time.monotonic()
    assert cli.main(["train", "--run-dir", "x", "model.dept=2"]) == 2
    assert capsys.readouterr().err == ""
    assert time.monotonic() - start >= 0.3


def test_other_ranks_end_when_the_launcher_ends_them(trained, monkeypatch):
    """It does so once rank 0 has ended: with the exit code of the error, and without waiting any longer."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", rank=1, world=2))
    monkeypatch.setattr(cli, "GRACE", 60.0)
    before = signal.getsignal(signal.SIGTERM)

    def launcher() -> None:
        deadline = time.monotonic() + 30
        while signal.getsignal(signal.SIGTERM) is before and time.monotonic() < deadline:
            time.sleep(0.01)
        if signal.getsignal(signal.SIGTERM) is not before:
            os.kill(os.getpid(), signal.SIGTERM)

    thread, start = threading.Thread(target=launcher), time.monotonic()
    thread.start()
    try:
        assert cli.main(["train", "--run-dir", "x", "model.dept=2"]) == 2
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 30


def test_a_wrong_launch_exits_with_2(trained, monkeypatch, capsys):
    def detect():
        raise LaunchError("RANK is set but WORLD_SIZE not")

    monkeypatch.setattr(launch_environment, "detect", detect)
    assert cli.main(["train", "--run-dir", "x"]) == 2
    assert capsys.readouterr().err == "megapromoe: RANK is set but WORLD_SIZE not\n"


def test_dry_run_describes_and_starts_nothing(trained, tmp_path, capsys):
    line = ["train", "--run-dir", str(tmp_path / "new"), "--dry-run"]
    assert cli.main([*line, "--yaml"]) == 0
    output = capsys.readouterr().out
    assert "layout over 1 rank" in output and f"{tmp_path / 'new'}: a new run" in output
    assert yaml.safe_load(output)["model"]["depth"] == resolve("digits").model.depth
    assert cli.main([*line, "data.condition_dropout=0.2", "train.steps=1000", "train.accumulation=2"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["parameters"] == parameters(resolve("digits").model).in_words
    assert lines["data"] == "digits: 1,797 records of 1x8x8, 10 classes"
    assert lines["steps"].startswith("1,000 of 128 images")
    assert lines["batch"] == "128 images = 64 for a rank x data parallel 1 x accumulation 2"
    assert lines["run"] == f"{tmp_path / 'new'}: a new run"
    assert {"model", "layout", "precision", "optimizer"} <= lines.keys()
    assert not trained and not (tmp_path / "new").exists()


def test_dry_run_reports_that_the_start_would_be_refused(trained, tmp_path, capsys):
    with RunDirectory.open(tmp_path, resolve("digits"), 1) as run:
        run.metrics.write_text('{"step": 1}\n')
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run", "model.depth=6"]) == 2
    assert "model.depth: the run has 4, not 6" in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    latents = ["data.source=latents", f"data.path={tmp_path / 'nowhere'}", f"data.cache={tmp_path / 'cache'}"]
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run", *latents]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("megapromoe: 2 problems in this start:") and "data.source: the run has" in captured.err
    )
    assert f"{tmp_path / 'nowhere'} holds no manifest.json; create it with megapromoe encode" in captured.err
    assert "4 blocks" in captured.out and f"{tmp_path}: refused, see below" in captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_opens_the_data(trained, tmp_path, capsys):
    """Each fault is found as by the start itself, and nothing is copied to the cache."""
    write(tmp_path / "latents", Arrays(count=40, classes=4, shape=(2, 4, 4)))
    model = ["model.in_channels=2", "model.input_size=4", "model.num_classes=4", "train.global_batch=8"]
    data = ["data.source=latents", f"data.path={tmp_path / 'latents'}", f"data.cache={tmp_path / 'cache'}"]
    line = ["train", "--run-dir", str(tmp_path / "new"), "--dry-run", *model, *data]
    assert cli.main(line) == 0
    assert "latents: 40 records of 2x4x4, 4 classes" in capsys.readouterr().out
    for fault, message in {
        "train.global_batch=41": "holds 40 records, fewer than train.global_batch = 41",
        "model.in_channels=4": "records have shape (2, 4, 4), the model takes (4, 4, 4)",
        "model.num_classes=9": "4 classes, the model has 9",
    }.items():
        assert cli.main([*line, fault]) == 2
        assert message in capsys.readouterr().err
    next((tmp_path / "latents").glob("shard-*")).unlink()
    assert cli.main(line) == 2
    assert "cannot be opened" in capsys.readouterr().err
    assert not trained and sorted(p.name for p in tmp_path.iterdir()) == ["latents"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("digits", "fashion")])
def test_a_large_preset_trains_on_nothing_that_was_not_chosen(preset, trained, tmp_path, capsys):
    line = ["train", "--preset", preset, "--run-dir", str(tmp_path / "run")]
    remedies = ["data.source=latents data.path=DIR", "data.source=synthetic"]
    for words in ([], ["--dry-run"]):
        assert cli.main([*line, *words]) == 2
        errors = capsys.readouterr().err
        assert "data.source = 'unset': no training data is chosen" in errors and all(r in errors for r in remedies)
    assert not trained and not (tmp_path / "run").exists()
    assert cli.main([*line, "data.path=latents"]) == 2
    assert "data.path = 'latents': is for data.source = latents or fashion_mnist: set that" in capsys.readouterr().err
    assert cli.main([*line, "data.source=synthetic"]) == 0 and trained[0][0].data.source == "synthetic"
    assert cli.main([*line, "data.source=latents", "data.path=DIR"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["show", "--preset", "promoe_l"],
        ["plan", "--preset", "promoe_xl", "--nodes", "1"],
        ["study", "plan", "study", "--preset", "promoe_b"],
        ["benchmark", "all", "--quick", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
def test_what_reads_no_data_needs_none(words, alone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0
    if words[0] == "show":
        assert "source: unset" in capsys.readouterr().out
        assert cli.main([*words, "--to-train"]) == 2
    if words[0] == "study":
        assert "cannot be trained yet: data.source = 'unset'" in capsys.readouterr().out
        for action in (["run"], ["submit", "--dry-run"]):
            assert cli.main(["study", action[0], "study", *action[1:]]) == 2
            assert "data.source=synthetic" in capsys.readouterr().err


def test_changing_the_steps_of_a_run_does_not_change_its_warm_up(trained, tmp_path, capsys):
    def warmup(*words: str) -> int:
        assert cli.main(["train", "--run-dir", str(tmp_path), *words]) == 0
        return trained[-1][0].train.warmup

    with RunDirectory.open(tmp_path, resolve("digits", overrides=["train.steps=20"]), 1) as run:
        assert warmup() == 30, "of a run that took no step nothing is kept"
        run.metrics.write_text('{"step": 1}\n')
    assert warmup("train.steps=20") == warmup() == warmup("train.steps=9000") == 2
    assert warmup("train.warmup=7") == 7
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "train.steps: 20 -> 500" in output and "train.warmup" not in output


def test_dry_run_of_a_run_in_use_may_be_tried_again(trained, tmp_path, capsys):
    with RunDirectory.claim(tmp_path, resolve("digits"), 1):
        assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run"]) == 1
    assert "in use by a live run" in capsys.readouterr().err
    assert cli.main(["train", "--run-dir", str(tmp_path), "--yaml"]) == 2 and not trained
