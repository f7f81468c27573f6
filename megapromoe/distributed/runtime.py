"""Start-up and the outside world: ranks, devices, threads. The only file that reads environment variables.

A rank learns who it is from whoever started it: torchrun or `deepspeed` (RANK, WORLD_SIZE, ...), srun (SLURM_*), mpirun
(asked through mpi4py), or nobody: then it is alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megapromoe.errors import UserError
from megapromoe.io import write_bytes

if TYPE_CHECKING:  # torch is imported where it is needed: a wrong command is told at once
    import torch
    from torch.distributed import Store


class LaunchError(UserError):
    """The environment of a launcher that does not say enough to start."""

    exit_code = 2


class StoreUnreachable(LaunchError):
    """The key-value store of the job does not answer."""

    exit_code = 1


@dataclass(frozen=True)
class Launch:
    """Who this process is among the processes of the job, and where they meet (`address`, `port`).

    `attempt` counts the launcher's restarts of the job.
    """

    launcher: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    attempt: int = 0


UNSET = (
    ". If they are left over in the environment of a start without a launcher: env -u RANK -u WORLD_SIZE megapromoe ..."
)
"""What to do where RANK and WORLD_SIZE may be of another job."""


def detect() -> Launch:
    """Reads the launcher's environment. Raises LaunchError, naming the variable, if it is incomplete or wrong."""
    launch = _read_environment()
    if launch.rank >= launch.world:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world} ({identity_source(launch)}): ranks are 0 to WORLD_SIZE - 1; start"
            f" with torchrun, mpirun or srun{UNSET if launch.launcher == 'torchrun' else ''}"
        )
    return launch


def identity_source(launch: Launch) -> str:
    """Where a rank has its number from, for messages: the variables and their values."""
    names = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_NTASKS")}.get(launch.launcher, ())
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or launch.launcher


def address_source(launch: Launch) -> str:
    """Where the address and port of the job are from, for messages: the variables and their values."""
    names = ["MASTER_ADDR", "MASTER_PORT"]
    if launch.launcher == "srun":
        nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in os.environ else "SLURM_NODELIST"
        names = [
            "MASTER_ADDR" if os.environ.get("MASTER_ADDR") else nodes,
            "MASTER_PORT" if os.environ.get("MASTER_PORT") else "SLURM_STEP_RESV_PORTS",
        ]
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or launch.launcher


def holds_store(launch: Launch) -> bool:
    """Whether this rank holds the key-value store of the job: rank 0, unless the launcher does."""
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _read_environment() -> Launch:
    env = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    if wrong := [f"{name}={env[name]!r}" for name in names if not env.get(name, "0").isdecimal()]:
        raise LaunchError(f"{', '.join(wrong)}: must be whole numbers; start with torchrun, mpirun or srun")
    if "RANK" in env:
        need = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if need:
            raise LaunchError(f"RANK is set but {', '.join(need)} not; start with torchrun, or set them all{UNSET}")
        local_world = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1)))
        return Launch(
            "torchrun",
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env["LOCAL_RANK"]),
            local_world,
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    if "OMPI_COMM_WORLD_RANK" in env or "PMI_RANK" in env and "SLURM_PROCID" not in env:
        return _from_mpi()
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return _from_slurm(env)
    return Launch("python")


def _from_mpi() -> Launch:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            "started by mpirun, but mpi4py does not import; pip install 'megapromoe[mpi]' (and an MPI library)"
        ) from error
    everyone = MPI.COMM_WORLD
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    meet = None
    if everyone.rank == 0:
        meet = (os.environ.get("MASTER_ADDR") or _own_address(everyone.size > node.size), _free_port())
    address, port = everyone.bcast(meet, root=0)
    return Launch("mpirun", everyone.rank, everyone.size, node.rank, node.size, address, port)


def _from_slurm(env: Mapping[str, str]) -> Launch:
    port = env.get("MASTER_PORT") or env.get("SLURM_STEP_RESV_PORTS", "").split("-")[0].split(",")[0]
    if not port:
        raise LaunchError("started by srun without a port to meet at; use srun --resv-ports, or export MASTER_PORT")
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    tasks_per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    if tasks_per_node is None:
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']!r}: must start with a number, as in '4(x2)'"
        )
    return Launch(
        "srun",
        int(env["SLURM_PROCID"]),
        int(env["SLURM_NTASKS"]),
        int(env["SLURM_LOCALID"]),
        int(tasks_per_node[0]),
        env.get("MASTER_ADDR") or first_host(nodes),
        int(port),
    )


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: "gpu[03-05,9],x" -> "gpu03"."""
    return all_hosts(nodelist)[0]


def all_hosts(nodelist: str) -> list[str]:
    """Every host of SLURM's compressed list, in its order: "gpu[03-05,9],x" -> gpu03, gpu04, gpu05, gpu9, x."""
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        texts, *rest = re.split(r"\[([^\]]*)\]", item)
        made = [texts]
        for ranges, text in zip(rest[::2], rest[1::2], strict=True):
            made = [f"{head}{number}{text}" for head in made for number in _numbers(ranges)]
        hosts += made
    return hosts


def _numbers(ranges: str) -> list[str]:
    """ "03-05,9" -> 03, 04, 05, 9."""
    numbers = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        numbers += [f"{n:0{len(low)}}" for n in range(int(low), int(high or low) + 1)]
    return numbers


def node_name() -> str:
    """The node that this process runs on: SLURM's name of it, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def expected_nodes(launch: Launch) -> dict[str, int]:
    """How many ranks srun starts on each node; nothing where another launcher started them, which does not say."""
    nodes, tasks = os.environ.get("SLURM_STEP_NODELIST"), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if launch.launcher != "srun" or not nodes:
        return {}
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):  # "2(x3),1" is 2, 2, 2, 1
        counts += [int(count)] * int(times or 1)
    hosts = all_hosts(nodes)
    return dict(zip(hosts, counts, strict=True)) if len(hosts) == len(counts) else {}


def settings() -> dict[str, str]:
    """The environment variables that steer NCCL, gloo, CUDA, OpenMP and the network libraries below them."""
    known = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_NUM_THREADS", "UCX_", "FI_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(known)}


def _own_address(several_nodes: bool) -> str:
    return socket.gethostbyname(socket.gethostname()) if several_nodes else "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def share_cores(processes: int) -> None:
    """Sets the threads of so many processes that this one starts at a time, so that they do not compete for cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def job_environment() -> dict[str, str]:
    """The environment of jobs that this process submits: the launchers start this Python unless another is chosen."""
    chosen = "MEGAPROMOE_ENV" in os.environ or "MEGAPROMOE_PYTHON" in os.environ
    return {**os.environ, **({} if chosen else {"MEGAPROMOE_PYTHON": sys.executable})}


def prepare() -> None:
    """Sets what DeepSpeed reads when it is first imported: without a GPU, that it need not look for one."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Job:
    """A job that was joined: this rank's device, and the key-value store that all ranks share."""

    device: torch.device
    store: Store


def device_of(launch: Launch) -> torch.device:
    """The GPU of this rank, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def start(launch: Launch, timeout: float, store: Store | None = None) -> Job:
    """Joins the job: device, threads, torch.distributed (NCCL on GPUs, gloo on CPU). Collective.

    Args:
        timeout: seconds after which a collective that some rank does not join ends the run.
        store: in which the ranks have met, see `rendezvous.gather`; None of a process that is alone.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # DeepSpeed picks its device by it
    device = device_of(launch)
    if cuda:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    if store is None:
        if launch.world > 1:
            raise ValueError(f"rank {launch.rank} of {launch.world} has no store to join the others in")
        store = dist.HashStore()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=limit,
        device_id=device if cuda else None,
    )
    return Job(device, store)


_FLIGHT_RECORDS: list[Path] = []  # the folder of NCCL's, once it is known
_DUMP = 10.0  # seconds that NCCL's flight recorder has to write


def keep_flight_records(folder: Path) -> None:
    """NCCL's flight recorder (its last collectives, their ranks and states) shall write to `folder` if the job hangs.

    Called before the job is joined. Both torch, when a collective times out, and `end` write there; torch makes no
    folder. `torchfrtrace --prefix rank_ FOLDER` compares the ranks' files.
    """
    _FLIGHT_RECORDS[:] = [folder]
    prefix = str(folder / "rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def end(message: str, code: int) -> NoReturn:
    """Ends this process at once, from any thread, whatever it waits for; leaves what tells why it waited.

    That is the Python stacks of all its threads on stderr, and NCCL's flight record.
    """
    print(f"megapromoe, {message}", file=sys.stderr, flush=True)
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    if _FLIGHT_RECORDS:
        writer = threading.Thread(target=_write_flight_record, args=(_FLIGHT_RECORDS[0],), daemon=True)
        writer.start()
        writer.join(_DUMP)
    os._exit(code)


def _write_flight_record(folder: Path) -> None:
    import torch.distributed as dist

    if not dist.is_initialized() or "nccl" not in dist.get_backend():
        return
    rank = dist.get_rank()
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # of builds with NCCL

        write_bytes(folder / f"rank_{rank}", _dump_nccl_trace(), parents=True)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"megapromoe, rank {rank}: no flight record: {error}", file=sys.stderr, flush=True)


def leave(error: BaseException) -> NoReturn:
    """Ends this process at once, with its traceback and exit code 1.

    An orderly end would wait for threads that wait for other ranks; leaving closes the connections, and those notice.
    """
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def stop() -> None:
    """Leaves the job; without it a run may abort after all its work is done."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
