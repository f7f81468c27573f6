"""The same program under every launcher: one process, torchrun, deepspeed, mpirun, and srun's environment."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked_ranks import ForkedRank, run_to_end
from support.training_runs import losses

from megapromoe.distributed.launch_environment import LaunchError, detect
from megapromoe.distributed.slurm_lists import first_host

RUN = ["train", "--preset", "digits", "train.steps=2", "train.warmup=0", "train.log_every=1", "train.save_every=0"]
TWO = ["parallel.ep=2"]
BIN = Path(sys.executable).parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "RANK", "WORLD", "LOCAL"))}
ENV = {**CLEAN, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
MAIN = [sys.executable, "-m", "megapromoe"]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def finished(command: list[str], env=ENV) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    code, text = run_to_end([*RUN, "--run-dir", str(folder / "run")], ENV, folder / "output")
    assert code == 0, text
    return losses(folder / "run")


def commands(folder: Path) -> dict[str, list[str]]:
    job = [*RUN, *TWO, "--run-dir", str(folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return {
        "torchrun": [*torchrun, "-m", "megapromoe", *job],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "megapromoe", *job],
        "mpirun": ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", *MAIN, *job],
    }


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_launchers_start_the_same_run(launcher, alone, tmp_path):
    command = commands(tmp_path / "run")[launcher]
    if shutil.which(command[0], path=ENV["PATH"]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = finished(command, ENV if launcher != "deepspeed" else {**ENV, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert start["layout"]["world"] == 2 and start["layout"]["ep"] == 2


@pytest.mark.full
def test_srun_environment(alone, tmp_path):
    env = {**ENV, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_RESV_PORTS": free_port(),
           "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}  # fmt: skip
    words, outputs = [*RUN, *TWO, "--run-dir", str(tmp_path / "run")], [tmp_path / f"output-{r}" for r in "01"]
    ranks = [
        ForkedRank(words, env | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}, output)
        for number, output in enumerate(outputs)
    ]
    try:
        for rank, output in zip(ranks, outputs, strict=True):
            assert rank.wait(180) == 0, output.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def test_bad_config_ends_every_rank_with_code_2_and_one_message(tmp_path):
    """More data ranks than images divide over, a misspelt key, a wrong type: told before any group is made."""
    env = {**ENV, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    bad = [*RUN, "--run-dir", str(tmp_path / "run"), "parallel.ep=3", "model.num_expert=4", "train.lr=fast"]
    ends = [run_to_end(bad, env | {"RANK": r}, tmp_path / f"output-{r}") for r in "01"]
    assert [code for code, _ in ends] == [2, 2]
    for word in ("parallel.ep", "did you mean num_experts", "train.lr"):
        assert word in ends[0][1]
    assert not ends[1][1].strip()
    assert not (tmp_path / "run").exists()


# ---- what the environment says


@pytest.mark.parametrize(
    "nodes, first", [("gpu[03-05,9],x", "gpu03"), ("a,b", "a"), ("n1", "n1"), ("rack[1-2]-gpu[7-9]", "rack1-gpu7")]
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_incomplete_environments_are_named(monkeypatch):
    for name in list(os.environ):
        if name not in ENV:
            monkeypatch.delenv(name)
    assert detect().world == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(LaunchError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        detect()
    monkeypatch.setenv("RANK", "zero")
    with pytest.raises(LaunchError, match="RANK='zero'"):
        detect()
    monkeypatch.delenv("RANK")
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="--resv-ports"):
        detect()
