"""Runs that local.sh and mpirun.sh start on this machine."""

import shutil
from pathlib import Path

import pytest
from support.launcher_scripts import ENV, call
from support.levels import full
from support.training_runs import losses

TINY = ["train.steps=3", "train.warmup=0", "train.log_every=1", "train.global_batch=32", "model.hidden_size=32"]


@pytest.fixture(scope="module", params=["2", full("4")], ids="{} ranks".format)
def ranks(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def local(ranks, tmp_path_factory) -> Path:
    """A folder with a run that local.sh started, and a cache folder."""
    folder = tmp_path_factory.mktemp("local")
    env = {"OMP_NUM_THREADS": "1", "NODE_CACHE": str(folder / "cache")}
    call("local", "digits", *TINY, NPROC=ranks, RUN_DIR=str(folder / "run"), **env)
    return folder


def test_local_trains(local, ranks):
    """Rank 0 keeps the terminal, the others their logs."""
    assert len(losses(local / "run")) == 3
    assert list((local / "run" / "logs").rglob(f"{int(ranks) - 1}/stderr.log"))
    assert (local / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.full
def test_mpirun_trains_the_same(local, ranks, tmp_path):
    if shutil.which("mpirun", path=ENV["PATH"]) is None:
        pytest.skip("mpirun is not installed")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"localhost slots={ranks}\n")
    env = {"OMP_NUM_THREADS": "1", "NODE_CACHE": str(local / "cache")}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    call("mpirun", "digits", *TINY, HOSTFILE=str(hosts), RUN_DIR=str(tmp_path / "mpi"), **env)
    assert losses(tmp_path / "mpi") == losses(local / "run")


def test_a_cache_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "cache").symlink_to(tmp_path)
    output = call(
        "local", "digits", *TINY, NPROC="1", RUN_DIR=str(tmp_path / "run"), NODE_CACHE=str(tmp_path / "cache"), code=2
    )
    assert "set NODE_CACHE" in output and not list((tmp_path / "run").glob("config.yaml"))
