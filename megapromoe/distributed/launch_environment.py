"""Rank, world size and address of the job, from the environment variables that the launcher sets.

The variables of several launchers can be set at the same time: a batch script has variables of SLURM, and mpirun
started in it adds its own. The first row that applies is used:

================================================  ===================================================================
variables                                         the process is a rank of
================================================  ===================================================================
RANK                                              torchrun or `deepspeed`: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*
OMPI_COMM_WORLD_RANK, MV2_COMM_WORLD_RANK,        mpirun: the rank comes from mpi4py, and the variables must agree
PMI_RANK or PMIX_RANK, unless srun has set them
SLURM_PROCID of a step with more than one task    srun: rank SLURM_PROCID of SLURM_STEP_NUM_TASKS
anything else                                     no launcher: a job of one process. This includes a batch script and a
                                                  shell of salloc, although SLURM_NTASKS counts their allocation's tasks
================================================  ===================================================================
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megapromoe.distributed.slurm_lists import all_hosts, first_host, tasks_of_nodes
from megapromoe.errors import ExitCode, UserError


class LaunchError(UserError):
    """The environment variables of the launcher are incomplete or inconsistent."""

    exit_code = ExitCode.MISCONFIGURED


class StoreUnreachable(LaunchError):
    """The key-value store of the job does not answer."""

    exit_code = ExitCode.FAILED


class RanksMissing(LaunchError):
    """Not all ranks of the job have started in time; their nodes may be down."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class LaunchEnvironment:
    """The identity of this process in its job, and the address of the job's store.

    Attributes:
        launcher: "torchrun", "mpirun", "srun", or "python" for a process without a launcher.
        rank, world: rank of this process and number of ranks.
        local_rank, local_world: the same on this node.
        address, port: of the job's store.
        attempt: how often the launcher has restarted the job.
        job: the launcher's name of the job; "" if it has none. It keeps apart two jobs that use the same address.
    """

    launcher: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    attempt: int = 0
    job: str = ""


class RankVariables(NamedTuple):
    """The variables in which an MPI launcher passes the rank and the number of ranks."""

    rank: str
    world: str


# The order matters: Open MPI also sets PMIX_RANK, and MVAPICH's launchers also set PMI_RANK.
MPI_RANKS = (
    RankVariables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    RankVariables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH 2
    RankVariables("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE"),  # MVAPICH 3 and later
    RankVariables("PMI_RANK", "PMI_SIZE"),  # Hydra, the launcher of MPICH, Intel MPI and MVAPICH; srun --mpi=pmi2
    RankVariables("PMIX_RANK", "PMIX_SIZE"),  # PRRTE, which does not set the size; srun --mpi=pmix
)
HYDRA = ("MPI_LOCALNRANKS", "HYDI_CONTROL_FD")  # set by Hydra, and not by srun --mpi=pmi2
SPECIAL_STEPS = 0xFFFFFFF0  # steps from this id on are not started by srun for tasks: batch, interactive shell, extern
PORTS = range(20000, 30000)  # below the range that the kernel uses for outgoing connections
RESOLVE = 10.0  # time-out of scontrol, in seconds

_UNSET = {
    "torchrun": ". If they are left over in the environment of a start without a launcher: env -u RANK -u WORLD_SIZE"
    " megapromoe ...",
    "srun": ". In a shell of srun --pty with several tasks, one process is started by: env -u SLURM_STEP_ID"
    " megapromoe ...",
}


def detect() -> LaunchEnvironment:
    """Reads the launcher's environment. Raises LaunchError, naming the variable, if it is incomplete or wrong."""
    launch = _read_environment(os.environ)
    if launch.rank >= launch.world:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world} ({identity_source(launch)}): ranks are 0 to WORLD_SIZE - 1; start"
            f" with torchrun, mpirun or srun{unset_hint(launch)}"
        )
    return launch


def _read_environment(env: Mapping[str, str]) -> LaunchEnvironment:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
    names += ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_LOCALID"]
    names += [name for variables in MPI_RANKS for name in variables]
    if wrong := [f"{name}={env[name]!r}" for name in names if not env.get(name, "0").isdecimal()]:
        raise LaunchError(f"{', '.join(wrong)}: must be whole numbers; start with torchrun, mpirun or srun")
    if "RANK" in env:
        return _from_torchrun(env)
    if variables := _mpi_variables(env):
        return _from_mpi(env, variables)
    if _in_step(env) and int(env[_step_size(env)]) > 1:
        return _from_slurm(env)
    return LaunchEnvironment("python")


# ---- torchrun and deepspeed


def _from_torchrun(env: Mapping[str, str]) -> LaunchEnvironment:
    need = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if need:
        raise LaunchError(
            f"RANK is set but {', '.join(need)} not; start with torchrun, or set them all{_UNSET['torchrun']}"
        )
    return LaunchEnvironment(
        "torchrun",
        int(env["RANK"]),
        int(env["WORLD_SIZE"]),
        int(env["LOCAL_RANK"]),
        int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1))),
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        env.get("TORCHELASTIC_RUN_ID", ""),
    )


def holds_store(launch: LaunchEnvironment) -> bool:
    """Whether this rank holds the key-value store of the job: rank 0 does, unless the launcher holds it."""
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


# ---- mpirun


def _mpi_variables(env: Mapping[str, str]) -> RankVariables | None:
    """The rank variables that an mpirun has set for this process; None without an mpirun."""
    for variables in MPI_RANKS:
        if variables.rank in env and not (variables.rank in ("PMI_RANK", "PMIX_RANK") and _set_by_srun(env, variables)):
            return variables
    return None


def _set_by_srun(env: Mapping[str, str], variables: RankVariables) -> bool:
    """Whether srun --mpi=pmi2 or --mpi=pmix has set these variables: they are then equal to SLURM's own numbers.

    An mpirun inside SLURM also uses srun, but starts one process per node with it. Then the numbers differ, or
    variables of Hydra are set.
    """
    if not _has_step_variables(env) or any(name in env for name in HYDRA):
        return False
    same_size = env.get(variables.world, env[_step_size(env)]) == env[_step_size(env)]
    return env[variables.rank] == env["SLURM_PROCID"] and same_size


def _from_mpi(env: Mapping[str, str], variables: RankVariables) -> LaunchEnvironment:
    """Gets ranks and nodes from MPI through mpi4py. Collective.

    Raises LaunchError if mpi4py does not import, or if it uses another MPI than the launcher. In the second case each
    process is rank 0 of 1 for mpi4py, and every process would train the complete run.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: a wheel of mpi4py without an MPI library
        reason = str(error).strip().splitlines()[0]
        raise LaunchError(
            f"started by mpirun, but mpi4py does not import ({reason}); pip install 'megapromoe[mpi]' and the MPI"
            " library of the launcher"
        ) from error
    everyone = MPI.COMM_WORLD
    rank, world = int(env[variables.rank]), int(env.get(variables.world, everyone.size))
    if (everyone.rank, everyone.size) != (rank, world):
        library = MPI.Get_library_version().strip("\0").splitlines()[0].split(",")[0]
        values = ", ".join(f"{name}={env[name]}" for name in variables if name in env)
        unset = " ".join(f"-u {name}" for name in variables if name in env)
        raise LaunchError(
            f"the launcher's variables give rank {rank} of {world} ({values}), but mpi4py, which uses {library}, gives"
            f" rank {everyone.rank} of {everyone.size}: start with the mpirun of that MPI, or let mpi4py use the"
            " launcher's library (MPI4PY_LIBMPI=/path/to/libmpi.so for a wheel of mpi4py, or build it with that MPI's"
            " mpicc: pip install --force-reinstall --no-binary mpi4py mpi4py). If the variables are left over in the"
            f" environment of a start without a launcher: env {unset} megapromoe ..."
        )
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    place = None
    if everyone.rank == 0:
        place = (env.get("MASTER_ADDR") or _own_address(everyone.size > node.size), _free_port())
    address, port = everyone.bcast(place, root=0)
    return LaunchEnvironment("mpirun", everyone.rank, everyone.size, node.rank, node.size, address, port)


def _own_address(several_nodes: bool) -> str:
    return socket.gethostbyname(socket.gethostname()) if several_nodes else "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


# ---- srun


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process as a task of a job step.

    SLURM_PROCID alone does not show this: a batch script and a shell of salloc have it too. Nor do the variables of a
    step: a batch script that was submitted from inside a step inherits them. So the running step is compared.
    """
    if not _has_step_variables(env) or int(env["SLURM_STEP_ID"]) >= SPECIAL_STEPS:
        return False
    return _running_step() in ("", f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}")


def _has_step_variables(env: Mapping[str, str]) -> bool:
    return all(name in env for name in ("SLURM_PROCID", "SLURM_STEP_ID", _step_size(env)))


def _running_step(processes: Path = Path("/proc")) -> str:
    """The SLURM step that this process runs in, such as "4711.0" or "4711.batch"; "" if it runs in none.

    It is read from the title of the ancestor process that manages the step, "slurmstepd: [4711.0]".
    """
    number = str(os.getppid())
    with contextlib.suppress(OSError, ValueError, IndexError):  # a process that has ended or may not be read
        while number != "0":
            title = (processes / number / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            if step := re.fullmatch(r"slurmstepd: \[(\d+\.\w+)\].*", title):
                return step[1]
            # "PID (NAME) STATE PARENT ...", where NAME may contain spaces and parentheses
            number = (processes / number / "stat").read_text().rpartition(")")[2].split()[1]
    return ""


def _step_size(env: Mapping[str, str]) -> str:
    """The variable with the number of tasks of this step. SLURM_NTASKS may hold that of the allocation."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"


def _from_slurm(env: Mapping[str, str]) -> LaunchEnvironment:
    port = env.get("MASTER_PORT") or env.get("SLURM_STEP_RESV_PORTS", "").split("-")[0].split(",")[0]
    if not port and "SLURM_JOB_ID" in env:
        port = str(port_of_step(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])))
    if not port:
        raise LaunchError(
            "started by srun without a port for the job's store; use srun --resv-ports, or export MASTER_PORT"
        )
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts = tasks_of_nodes(tasks)
    if not counts:
        raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={tasks!r}: must start with a number, as in '4(x2)'")
    node = int(env.get("SLURM_NODEID", 0))
    return LaunchEnvironment(
        "srun",
        int(env["SLURM_PROCID"]),
        int(env[_step_size(env)]),
        int(env["SLURM_LOCALID"]),
        counts[node] if node < len(counts) else counts[0],
        env.get("MASTER_ADDR") or _node_address(first_host(nodes)),
        int(port),
        job=f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}",
    )


def port_of_step(job: int, step: int) -> int:
    """The port of a step's store if SLURM reserves none: the same for all ranks, different for other steps."""
    return PORTS[(17 * job + step) % len(PORTS)]


def _node_address(name: str) -> str:
    """The name if it resolves, otherwise the node's address in SLURM's configuration."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    try:
        command = ["scontrol", "--oneliner", "show", "node", name]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE).stdout
    except (OSError, subprocess.TimeoutExpired):
        return name  # `rendezvous` reports a name that does not resolve
    address = re.search(r" NodeAddr=(\S+)", shown)
    return address[1] if address else name


def expected_nodes(launch: LaunchEnvironment) -> dict[str, int]:
    """Node -> number of ranks that srun starts on it; empty for other launchers, which do not pass it."""
    nodes, tasks = os.environ.get("SLURM_STEP_NODELIST"), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if launch.launcher != "srun" or not nodes:
        return {}
    hosts, counts = all_hosts(nodes), tasks_of_nodes(tasks)
    return dict(zip(hosts, counts, strict=True)) if len(hosts) == len(counts) else {}


def node_name() -> str:
    """The name of this node: SLURM's node name if there is one, otherwise the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---- for messages


def identity_source(launch: LaunchEnvironment) -> str:
    """The variables, with values, that give this process its rank; for messages."""
    names = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", _step_size(os.environ))}
    return _values(names.get(launch.launcher, ()), launch)


def address_source(launch: LaunchEnvironment) -> str:
    """The variables, with values, that give the address and port of the job; for messages."""
    names = ["MASTER_ADDR", "MASTER_PORT"]
    if launch.launcher == "srun":
        nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in os.environ else "SLURM_NODELIST"
        ports = (
            ["SLURM_STEP_RESV_PORTS"] if os.environ.get("SLURM_STEP_RESV_PORTS") else ["SLURM_JOB_ID", "SLURM_STEP_ID"]
        )
        names = ["MASTER_ADDR"] if os.environ.get("MASTER_ADDR") else [nodes]
        names += ["MASTER_PORT"] if os.environ.get("MASTER_PORT") else ports
    return _values(names, launch)


def unset_hint(launch: LaunchEnvironment) -> str:
    """The end of a message: how to unset rank variables that may be left over from another job."""
    return _UNSET.get(launch.launcher, "")


def _values(names: list[str] | tuple[str, ...], launch: LaunchEnvironment) -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or launch.launcher
