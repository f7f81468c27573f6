"""Errors of commands: messages, exit codes, and which rank prints them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapromoe import cli
from megapromoe.checkpoint.run_directory import RunDirectoryError, RunInUse
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment, LaunchError, RanksMissing, StoreUnreachable


def fails_with(monkeypatch, trained, error: BaseException) -> None:
    def train(*arguments):
        raise error

    monkeypatch.setattr(sys.modules["megapromoe.training.loop"], "train", train)


def test_errors_of_the_package_are_sentences(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, RunInUse("runs/a: in use"))
    assert cli.main(["train", "--run-dir", "x"]) == 1
    assert capsys.readouterr().err == "megapromoe: runs/a: in use\n"


@pytest.mark.parametrize(
    "error, message, code",
    [
        (RunInUse, "", 1),
        (RunDirectoryError, "", 2),
        (RanksMissing, "megapromoe, rank 1: why\n", 1),
        (StoreUnreachable, "megapromoe, rank 1: why\n", 1),
        (LaunchError, "megapromoe, rank 1: why\n", 2),
    ],
)
def test_another_rank_than_0_reports_its_own_error(trained, monkeypatch, capsys, error, message, code):
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", rank=1, world=2))
    fails_with(monkeypatch, trained, error("why"))
    assert cli.main(["train", "--run-dir", "x"]) == code
    assert capsys.readouterr().err == message


def test_what_is_no_error_for_the_user_is_a_bug_and_keeps_its_traceback(trained, monkeypatch):
    from megapromoe.data.sample_stream import SampleStream

    loop = sys.modules["megapromoe.training.loop"]
    monkeypatch.setattr(loop, "train", lambda *_: SampleStream.micro_batches(0, 2, 0, 1, 7))
    with pytest.raises(ValueError, match="train.global_batch: 7"):
        cli.main(["train", "--run-dir", "x"])
    monkeypatch.setattr(loop, "train", lambda *_: json.loads("no json"))
    with pytest.raises(ValueError):
        cli.main(["train", "--run-dir", "x"])
    fails_with(monkeypatch, trained, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "--run-dir", "x"])


def test_a_package_that_is_missing_is_named_with_the_environment_and_is_not_tried_again(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed.ops"))
    assert cli.main(["train", "--run-dir", "x"]) == 2
    errors = capsys.readouterr().err
    assert f"deepspeed is not installed in the environment that this process runs in, {sys.prefix}; install" in errors
    wheel = ImportError("libcudart.so.12: cannot open shared object file", name="torch._C", path="/x/torch/_C.so")
    fails_with(monkeypatch, trained, wheel)
    assert cli.main(["train", "--run-dir", "x"]) == 2
    assert "torch, in the environment" in capsys.readouterr().err
    for bug in (
        ModuleNotFoundError("no", name="megapromoe.nothing"),
        ImportError("cannot import name 'x' from 'torch'", name="torch", path="/x/torch/__init__.py"),
        ImportError("no name"),
    ):
        fails_with(monkeypatch, trained, bug)
        with pytest.raises(ImportError):
            cli.main(["train", "--run-dir", "x"])


def test_an_interrupt_exits_with_130(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, KeyboardInterrupt())
    assert cli.main(["train", "--run-dir", "x"]) == 130
    assert capsys.readouterr().err == "megapromoe: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_exit_code_needs_no_place_for_the_message():
    """stderr is a file on a full disk, or a terminal that is gone."""
    with open("/dev/full", "w") as full:
        words = ["train", "--run-dir", "x", "train.steps=none"]
        done = subprocess.run([sys.executable, "-m", "megapromoe", *words], stderr=full, timeout=60)
    assert done.returncode == 2


def test_torchrun_passes_the_command_on_and_one_rank_reports_the_error(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "megapromoe", "train", "--run-dir", str(tmp_path / "run"), "trian.lr=1", "parallel.tp=4"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode
    assert done.stderr.count("2 problems in the configuration") == 1
    assert "did you mean train?" in done.stderr and "parallel.tp = 4: must divide the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()
