"""A command line as the ranks of a job in the workers of `support.processes`: no process is started for a rank."""

import os
import socket
from pathlib import Path

import torch
from support import processes

from megapromoe import cli
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment


def exit_codes(ranks: int, folder: Path, words: list[str]) -> list[int]:
    """The exit code of `megapromoe WORDS` on each rank of a launcher's job that is started in a folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return processes.run(ranks, _as_rank, str(folder), port, words)


def leave_job() -> None:
    """Ends this worker's own torch.distributed job: the command line joins one of its own."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"


def _as_rank(folder: str, port: int, words: list[str]) -> int:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    leave_job()
    os.chdir(folder)
    launch = (
        LaunchEnvironment("torchrun", rank, world, rank, world, "127.0.0.1", port)
        if world > 1
        else LaunchEnvironment("python")
    )
    launch_environment.detect = lambda: launch
    return cli.main(words)
