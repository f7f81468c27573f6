"""Start-up and the outside world: devices, threads, torch.distributed.

This file and `launch_environment.py` are the only ones that read environment variables.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.distributed.launch_environment import Launch

if TYPE_CHECKING:  # torch is imported where it is needed: a wrong command is told at once
    import torch
    from torch.distributed import Store


def settings() -> dict[str, str]:
    """The environment variables that steer NCCL, gloo, CUDA, OpenMP and the network libraries below them."""
    known = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_NUM_THREADS", "UCX_", "FI_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(known)}


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


def describe_device(device: torch.device) -> str:
    """What a rank computes on, in words: the name of its GPU, or the CPU and its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)} of each rank"


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


def enable_flight_records(folder: Path) -> None:
    """NCCL's flight recorder (its last collectives, their ranks and states) shall write to `folder` if the job hangs.

    Called before the job is joined. Both torch, when a collective times out, and `process_end.end` write there; torch
    makes no folder. `torchfrtrace --prefix rank_ FOLDER` compares the ranks' files.
    """
    prefix = str(folder / "rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def stop() -> None:
    """Leaves the job; without it a run may abort after all its work is done."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
