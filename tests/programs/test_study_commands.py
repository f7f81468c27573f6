"""The commands of a study: what options plan and submit, wrong words, and all of it for real."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.small_studies import TINY, recipe
from support.stand_ins import command_of, wait_until

from megapromoe.cli import main
from megapromoe.planning.cost import parameters
from megapromoe.studies import runs
from megapromoe.studies.recipe import recipe_dict
from megapromoe.studies.study import open_study, plan

ROOT = Path(__file__).parents[2]


def test_submit_requests_only_missing_tasks(tmp_path, capsys):
    study = plan(tmp_path, recipe(seeds=[0, 1, 2]))
    done = study.run(study.tasks[2]) / "checkpoints" / "step-00000003"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    assert main(["study", "submit", str(tmp_path), "--jobs", "2", "--dry-run", "--time=5", "--partition", "gpu"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:5] == ["sbatch", "--array=0-1,3-5%2", "--time=5", "--partition", "gpu"]
    assert words[5:] == [str(ROOT / "launchers" / "scaling_experts.sh"), str(tmp_path)]


def test_submit_returns_the_exit_code_of_sbatch(tmp_path, monkeypatch, capsys):
    study = plan(tmp_path / "study", recipe(seeds=[0]))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\npwd > "$0.where"\necho "$@" > "$0.words"\nexit 4\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["study", "submit", str(study.folder)]) == 4
    assert (tmp_path / "sbatch.words").read_text().split()[0] == "--array=0-1"
    assert Path((tmp_path / "sbatch.where").read_text().strip()) == study.folder / "logs"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["study", "submit", str(study.folder)]) == 1
    assert "sbatch is not on PATH" in capsys.readouterr().err


@pytest.mark.full
def test_a_tiny_study_end_to_end_killed_in_between(tmp_path, capsys):
    """plan, run, kill -9 of tool and training, run again by two commands at once, collect, plot."""
    folder = tmp_path / "study"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(recipe(seeds=[0], settings=TINY | {"train.steps": 40}))))
    assert main(["study", "plan", str(folder), "--recipe", str(file), "--throughput", "1e9"]) == 0
    assert "estimate:" in capsys.readouterr().out
    study = open_study(folder)
    command = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), "run", str(folder), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: min(study.steps_saved(task) for task in study.tasks) >= 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trainings = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if str(folder) in command_of(pid)]
    for pid in trainings:
        os.kill(pid, signal.SIGKILL)
    assert trainings
    saved = [study.steps_saved(task) for task in study.tasks]
    assert min(saved) < 40

    words = [sys.executable, "-m", "megapromoe", "study", "run", str(folder)]
    commands = [
        subprocess.Popen(other, env=environment, stderr=subprocess.PIPE, text=True) for other in (command[:-2], words)
    ]
    try:
        errors = [started.communicate(timeout=600)[1] for started in commands]
    finally:
        for started in commands:
            started.kill()
    assert [started.returncode for started in commands] == [0, 0], errors
    assert all("2 of 2 done, 0 failed" in text for text in errors)
    assert not study.missing()
    starts = [json.loads((study.run(task) / "environment.json").read_text()) for task in study.tasks]
    assert all(len(start) == 2 for start in starts), "taken up again, not begun anew"
    for task in study.tasks:
        steps = [json.loads(line)["step"] for line in (study.run(task) / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 41))
    assert all(study.loss_file(task).exists() for task in study.tasks)
    capsys.readouterr()
    assert main(["study", "collect", str(folder)]) == 0
    assert "2 runs are done." in (folder / "results.md").read_text()
    losses = [float(line["fixed_loss"]) for line in csv.DictReader((folder / "results.csv").read_text().splitlines())]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 3 for loss in losses)
    assert main(["study", "plot", str(folder)]) == 0
    for name in ("loss_experts", "loss_compute", "routing", "cost"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_commands_are_refused_with_the_reason(tmp_path, capsys):
    assert main(["study", "run", str(tmp_path)]) == 2
    assert "holds no study.yaml" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--preset", "digits", "--routers", "promo"]) == 2
    assert "must be one of dense" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit) as caught:
        main(["study", "run", str(tmp_path), "--jobs", "0"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["study", "run", str(tmp_path), "train.steps=3"])
    assert caught.value.code == 2 and "only `plan` takes them" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--preset", "digits", "steps"]) == 2
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", "digit"]) == 2
    assert "did you mean digits" in capsys.readouterr().err
    assert main(["study", "plan", str(tmp_path / "s"), "--recipe", "digits", "--experts", "4", "--routers", "tc"]) == 2
    assert "remove --experts, --routers" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_options_make_a_recipe(tmp_path, capsys):
    words = [
        "--preset",
        "digits",
        "--experts",
        "4",
        "8",
        "16",
        "32",
        "--routers",
        "promoe",
        "tc",
        "dense",
        "--seeds",
        "0",
        "1",
    ]
    assert main(["study", "plan", str(tmp_path), *words, "train.steps=7", "train.warmup=2"]) == 0
    study = open_study(tmp_path)
    assert len(study.tasks) == 2 * (4 + 4 + 1) and study.recipe.baseline == "dense"
    assert {task.config.train.steps for task in study.tasks} == {7}
    active = [parameters(task.config.model).active for task in study.tasks]
    assert max(active) / min(active) < 1.02


def submitted(folder, launcher: str, ranks: int, capsys, *words: str, code: int = 0) -> str:
    """The options of sbatch that `study submit` prints, or why it prints none."""
    if not folder.exists():
        plan(folder, recipe(seeds=[0], ranks=ranks, launcher=launcher.split()))
    assert main(["study", "submit", str(folder), "--dry-run", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out.split("--array=0-1 ")[1].split(str(ROOT))[0].strip()


@pytest.mark.parametrize(
    "launcher, ranks, words, expected",
    [
        ("torchrun --nproc-per-node 8", 8, [], "--nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=96"),
        ("torchrun --nproc-per-node 4", 4, [], "--nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=48"),
        ("srun python", 4, [], "--nodes=1 --ntasks=4 --ntasks-per-node=4 --gpus-per-node=4"),
        ("srun python", 16, [], "--nodes=2 --ntasks=16 --ntasks-per-node=8 --gpus-per-node=8"),
        ("srun python", 16, ["--gpus-per-node=a100:4"], "--nodes=4 --ntasks=16 --ntasks-per-node=4 --gpus-per-node=4"
         " --gpus-per-node=a100:4"),
        ("/usr/bin/srun python", 8, ["--nodes", "4"], "--nodes=4 --ntasks=8 --ntasks-per-node=2 --gpus-per-node=2"
         " --nodes 4"),
        ("srun python", 8, ["-N4"], "--nodes=4 --ntasks=8 --ntasks-per-node=2 --gpus-per-node=2 -N4"),
        ("srun python", 8, ["--nodelist=n1"], "--nodes=1 --ntasks=8 --ntasks-per-node=8 --gpus-per-node=8"
         " --nodelist=n1"),
    ],
)  # fmt: skip
def test_submit_requests_the_gpus_of_the_ranks(launcher, ranks, words, expected, tmp_path, capsys):
    assert submitted(tmp_path / "s", launcher, ranks, capsys, *words) == expected


def test_ranks_that_the_launcher_cannot_reach_are_refused(tmp_path, capsys):
    message = submitted(tmp_path / "s", "torchrun --standalone --nproc-per-node 16", 16, capsys, code=2)
    assert "16 ranks take 2 nodes of 8 GPUs; plan the study with --launcher 'srun python'" in message
    assert submitted(tmp_path / "s", "", 16, capsys, "--gpus-per-node=16").startswith("--nodes=1 --ntasks=1 ")
    message = submitted(tmp_path / "t", "srun python", 8, capsys, "--nodes=3", code=2)
    assert "ranks = 8: do not divide evenly over 3 nodes; give --nodes=N, N one of 1, 2, 4, 8" in message


def test_srun_gets_the_signal_to_save_that_it_forwards(tmp_path):
    """It would kill the ranks at SIGTERM."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\ntrap \'echo USR1 > "$0.heard"; exit 75\' USR1\n: > "$0.started"\n'
                    "while :; do sleep 0.1; done\n")  # fmt: skip
    srun.chmod(0o755)
    study = plan(tmp_path / "s", recipe(seeds=[0], ranks=2, launcher=[str(srun), "python"]))
    codes = runs.run_tasks(study, study.tasks[:1], 1, lambda: (tmp_path / "srun.started").exists())
    assert set(codes.values()) == {75} and (tmp_path / "srun.heard").read_text() == "USR1\n"
