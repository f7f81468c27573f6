"""Rank and world size from the variables that SLURM 22.05, Hydra (MPICH 5.0) and Open MPI set.

The variables were observed in these programs; `tests/cluster/test_environments.py` starts them.
"""

import os
import sys
import types

import pytest

from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import (
    LaunchEnvironment,
    LaunchError,
    detect,
    identity_source,
    port_of_step,
)
from megapromoe.distributed.slurm_lists import tasks_of_nodes

LAUNCHERS = ("RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC", "SLURM", "OMPI", "PMI", "MV2", "MVP", "MPI_", "HYDI")

# An allocation of 2 nodes and 4 tasks.
ALLOCATION = {
    "SLURM_JOB_ID": "9", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def step(tasks: int, per_node: str, rank: int, local: int, node: int, number: str = "0", nodes: str = "n[1-2]"):
    return {
        "SLURM_STEP_ID": number, "SLURM_STEPID": number, "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node),
    }  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """A function that detects the launch environment from variables, in a process of the SLURM step `running`."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch_environment, "_node_address", lambda name: name)

    def launch(variables: dict[str, str], running: str = "") -> LaunchEnvironment:
        monkeypatch.setattr(launch_environment, "_running_step", lambda: running)
        for name in list(os.environ):
            if name.startswith(LAUNCHERS):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return detect()

    return launch


# ---- SLURM

ALONE = {
    "a shell of salloc": (ALLOCATION, ""),
    "a shell of salloc in a step of its own": (
        ALLOCATION | step(1, "1", 0, 0, 0, number="4294967290", nodes="n1"),
        "9.interactive",
    ),
    "the same, where MpiDefault=pmix": (
        ALLOCATION | step(1, "1", 0, 0, 0, number="4294967290", nodes="n1") | {"PMIX_RANK": "0"},
        "9.interactive",
    ),
    "srun --pty bash": (BATCH | {"SLURM_NTASKS": "1"} | step(1, "1", 0, 0, 0, nodes="n1"), "9.0"),
    "srun --preserve-env --pty bash": (ALLOCATION | step(1, "1", 0, 0, 0, nodes="n1"), "9.0"),
    "a batch script": (BATCH, "9.batch"),
    "a batch script that a task of job 7 has submitted": (
        BATCH | step(4, "2(x2)", 0, 0, 0) | {"SLURM_PROCID": "0"},
        "9.batch",
    ),
}


@pytest.mark.parametrize("context", ALONE)
def test_a_shell_or_script_of_an_allocation_is_one_process(context, launched):
    variables, running = ALONE[context]
    assert launched(variables, running) == LaunchEnvironment("python")


def test_tasks_of_a_step_are_ranks(launched):
    """SLURM_NTASKS is the number of tasks of the step or, with --preserve-env, of the allocation."""
    for tasks in ("2", "4"):
        launch = launched(ALLOCATION | {"SLURM_NTASKS": tasks} | step(2, "1(x2)", 1, 0, 1, number="3"), "9.3")
        assert launch == LaunchEnvironment("srun", 1, 2, 0, 1, "n1", port_of_step(9, 3), job="9.3")
        assert identity_source(launch) == "SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2"


def test_tasks_of_a_step_in_a_step_are_those_of_the_inner(launched):
    """srun --overlap inside a task, also in a container that hides SLURM's processes."""
    for running in ("9.1", ""):
        assert launched(ALLOCATION | step(3, "2,1", 2, 0, 1, number="1"), running).rank == 2


def test_each_node_has_its_own_number_of_ranks(launched):
    assert [launched(ALLOCATION | step(3, "2,1", r, r % 2, r // 2)).local_world for r in range(3)] == [2, 2, 1]
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE='many': must start with a number"):
        launched(ALLOCATION | step(3, "many", 0, 0, 0))
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1] and tasks_of_nodes("16") == [16] and tasks_of_nodes("") == []


def test_the_port_is_given_or_reserved_or_that_of_the_step(launched):
    rank = ALLOCATION | step(2, "1(x2)", 0, 0, 0)
    assert launched(rank).port == port_of_step(9, 0)
    assert launched(rank | {"SLURM_STEP_RESV_PORTS": "12001-12002"}).port == 12001
    assert launched(rank | {"SLURM_STEP_RESV_PORTS": "12001", "MASTER_PORT": "7777"}).port == 7777


def test_steps_and_jobs_on_one_node_have_different_ports():
    """500 jobs with three steps each, and 16 steps of one job."""
    ports = {(job, number): port_of_step(job, number) for job in range(4_000_000, 4_000_500) for number in range(3)}
    assert len(set(ports.values())) == len(ports)
    assert len({port_of_step(4711, number) for number in range(16)}) == 16
    assert all(1024 < port < 32768 for port in ports.values())


def test_a_node_name_that_does_not_resolve_is_replaced_by_its_address_in_slurm(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$4" = n1.nowhere.invalid ] && echo "NodeName=n1 NodeAddr=10.1.2.3 Port=6818"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert launch_environment._node_address("n1.nowhere.invalid") == "10.1.2.3"
    assert launch_environment._node_address("n2.nowhere.invalid") == "n2.nowhere.invalid"
    assert launch_environment._node_address("localhost") == "localhost"


def test_the_running_step_is_that_of_the_nearest_slurmstepd(tmp_path, monkeypatch):
    """Processes 50 (bash) <- 40 (slurmstepd of 2.batch) <- 30 (slurmd) <- 1."""
    for number, parent, title in (
        ("50", "40", "/bin/bash\0-c\0x\0"),
        ("40", "30", "slurmstepd: [2.batch]\0"),
        ("30", "1", "slurmd\0"),
        ("1", "0", "init\0"),
    ):
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_text(title)
        (tmp_path / number / "stat").write_text(f"{number} (a (b) c) S {parent} 1 1 0")
    for parent, running in (("50", "2.batch"), ("30", ""), ("7", "")):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: int(parent))
        assert launch_environment._running_step(tmp_path) == running


# ---- MPI


class Communicator:
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def Split_type(self, kind):
        return self

    def bcast(self, value, root):
        return value or ("10.0.0.1", 4242)


@pytest.fixture
def mpi(monkeypatch):
    """A function that installs a fake mpi4py, for which this process is rank `rank` of `size`."""

    def install(rank: int, size: int) -> None:
        library = types.SimpleNamespace(
            COMM_WORLD=Communicator(rank, size),
            COMM_TYPE_SHARED=0,
            Get_library_version=lambda: "Open MPI v5.0.11, package: x\0",
        )
        module = types.ModuleType("mpi4py")
        module.MPI = library
        monkeypatch.setitem(sys.modules, "mpi4py", module)

    return install


HYDRA = {"PMI_FD": "9", "PMI_HOSTNAME": "n1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
MPIRUN = {
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"},
    "MPICH": HYDRA | {"PMI_RANK": "1", "PMI_SIZE": "4", "HYDI_CONTROL_FD": "7"},
    "MPICH, in a batch script": BATCH | HYDRA | {"PMI_RANK": "1", "PMI_SIZE": "4", "HYDI_CONTROL_FD": "7"},
    "MPICH, which starts its proxies by srun": (
        BATCH | step(2, "1(x2)", 0, 0, 0) | HYDRA | {"PMI_RANK": "1", "PMI_SIZE": "4"}
    ),
    "Open MPI, which starts its daemons by srun": (
        BATCH | step(2, "1(x2)", 0, 0, 0) | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    ),
    "mpirun_rsh of MVAPICH 2": {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"},
    "PRRTE, in a batch script": BATCH | {"PMIX_RANK": "1"},
}


@pytest.mark.parametrize("launcher", MPIRUN)
def test_mpirun_is_recognized_inside_a_slurm_job_too(launcher, launched, mpi):
    mpi(1, 4)
    launch = launched(MPIRUN[launcher])
    assert (launch.launcher, launch.rank, launch.world, launch.port) == ("mpirun", 1, 4, 4242)


@pytest.mark.parametrize("launcher", MPIRUN)
def test_an_mpi4py_of_another_mpi_is_refused_on_every_rank(launcher, launched, mpi):
    """For it each process is rank 0 of 1, so each would train the complete run."""
    mpi(0, 1)
    with pytest.raises(LaunchError, match=r"rank 1 of .* rank 0 of 1: start with the mpirun of that MPI") as refused:
        launched(MPIRUN[launcher])
    assert refused.value.exit_code == 2 and "uses Open MPI v5.0.11" in str(refused.value)
    if "PMIX_RANK" not in MPIRUN[launcher]:
        first = {k: "0" if k.endswith("_RANK") else v for k, v in MPIRUN[launcher].items()}
        with pytest.raises(LaunchError, match="rank 0 of 4"):
            launched(first)


def test_one_process_of_mpich_on_each_node_is_recognized(launched, mpi):
    """The numbers are then equal to those of the srun that started Hydra's proxies."""
    mpi(1, 2)
    numbers = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}
    assert launched(BATCH | step(2, "1(x2)", 1, 0, 1) | numbers).launcher == "mpirun"


@pytest.mark.parametrize("variables", [{"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "11"}, {"PMIX_RANK": "1"}])
def test_srun_with_an_mpi_plugin_stays_srun(variables, launched):
    """It needs no mpi4py: the ranks connect at the port of the step."""
    launch = launched(ALLOCATION | step(2, "1(x2)", 1, 0, 1) | variables, "9.0")
    assert (launch.launcher, launch.rank, launch.world) == ("srun", 1, 2)


def test_an_mpi4py_that_does_not_load_is_a_user_error(launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py does not import .*pip install 'megapromoe\[mpi\]'"):
        launched(MPIRUN["MPICH"])

    class Broken(types.ModuleType):
        def __getattr__(self, name):  # as a wheel of mpi4py that finds no library
            raise RuntimeError("cannot load MPI library\nlibmpi.so.12: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken("mpi4py"))
    with pytest.raises(LaunchError, match=r"mpi4py does not import \(cannot load MPI library\)"):
        launched(MPIRUN["MPICH"])


# ---- torchrun

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "run",
}  # fmt: skip


@pytest.mark.parametrize("outer", [{}, BATCH, BATCH | step(2, "1(x2)", 1, 0, 1), MPIRUN["Open MPI"]])
def test_the_variables_of_torchrun_come_first(outer, launched):
    """In a batch script, and if torchrun was started by srun or mpirun on each node."""
    assert launched(outer | TORCHRUN) == LaunchEnvironment("torchrun", 3, 4, 1, 2, "n1", 29500, job="run")
