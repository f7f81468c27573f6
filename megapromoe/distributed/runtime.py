"""Start-up of a process: device, threads, torch.distributed, and the environment variables of libraries.

Only this file and `launch_environment.py` read environment variables.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.imports import uncollected

if TYPE_CHECKING:  # torch is imported in the functions: a wrong command line is then reported without that delay
    import torch
    from torch.distributed import Store


def settings() -> dict[str, str]:
    """The environment variables that configure NCCL, gloo, CUDA, OpenMP and their network libraries."""
    prefixes = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_NUM_THREADS", "UCX_", "FI_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def share_cores(processes: int) -> None:
    """Divides the cores among `processes` child processes that run at the same time, unless OMP_NUM_THREADS is set."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; empty without one. Imports no torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name for name in chosen.replace(" ", "").split(",") if name and not name.startswith("-"))
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no driver, or one that does not answer
        return ()
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    return tuple(map(str, range(count)))


def environment_on(gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a child process that shall see only these GPUs."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def job_environment() -> dict[str, str]:
    """The environment of jobs that this process submits. Their launch scripts use this Python unless one is chosen."""
    chosen = "MEGAPROMOE_ENV" in os.environ or "MEGAPROMOE_PYTHON" in os.environ
    return {**os.environ, **({} if chosen else {"MEGAPROMOE_PYTHON": sys.executable})}


def prepare() -> None:
    """Sets the environment variables that DeepSpeed reads on import: without a GPU, its CPU accelerator."""
    with uncollected():
        import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def use_cpu() -> None:
    """Hides GPUs from this process; call it before anything asks torch for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@dataclass(frozen=True)
class Job:
    """An initialized job: this rank's device, and the key-value store of the job."""

    device: torch.device
    store: Store


def device_of(launch: LaunchEnvironment) -> torch.device:
    """The GPU of this rank, or the CPU without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def describe_device(device: torch.device) -> str:
    """A description of a rank's device: the name of the GPU, or the CPU and the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)} of each rank"


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a rank's GPU; None on a CPU, whose memory processes share."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def init_process_group(launch: LaunchEnvironment, timeout: float, store: Store | None = None) -> Job:
    """Sets the device and threads, and initializes torch.distributed (NCCL on GPUs, gloo on CPUs). Collective.

    Args:
        launch: this rank's identity.
        timeout: time-out of collectives, in seconds.
        store: the store of the job, from `rendezvous.connect_all_ranks`; None for a job of one rank.

    Raises ValueError if several ranks have no store.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # DeepSpeed chooses its device by it
    device = device_of(launch)
    if cuda:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    if store is None:
        if launch.world > 1:
            raise ValueError(f"rank {launch.rank} of {launch.world}: a job of several ranks needs a store")
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


def init_fake_process_group(rank: int, world: int) -> None:
    """Initializes torch.distributed as one rank of a job that has no other, on the CPU.

    Collectives complete, send nothing and leave their tensors as they are. Source: torch.testing._internal.distributed.
    fake_pg, which torch's own estimates of memory use.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    use_cpu()
    prepare()
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def enable_flight_records(folder: Path) -> None:
    """Makes NCCL's flight recorder (the last collectives with ranks and states) write to `folder` if the job hangs.

    Call it before `init_process_group`. The files are written by torch when a collective times out, which does not
    create the folder, and by `process_end.hard_exit`. `torchfrtrace --prefix rank_ FOLDER` compares those of all ranks.
    """
    prefix = str(folder / "rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def destroy_process_group() -> None:
    """Destroys the process group, if there is one. Without this call a process may abort on exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
