"""Run directories of tiny models whose images are drawn, and jobs of several ranks that draw them."""

import os
import socket
from pathlib import Path

import torch
from support import processes

from megapromoe.checkpoint.manager import CheckpointManager
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.errors import UserError
from megapromoe.nn.parallelize import build

TINY = (
    "model.hidden_size=16",
    "model.heads=2",
    "model.depth=2",
    "sample.steps=3",
    "sample.batch=4",
    "train.global_batch=8",
    "train.timeout=60",
)
ALONE = LaunchEnvironment("python")


def tiny(*overrides: str) -> Config:
    """The config of these runs with overrides."""
    return resolve("digits", overrides=(*TINY, *overrides))


def saved_run(folder: str, *overrides: str) -> None:
    """Writes a run directory with checkpoints of steps 1 and 2, whose averages are unlike the weights."""
    config = tiny(*overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    engine = Engine(build(config, mesh), config, mesh)
    ema = EMA(engine, [0.5])
    for average in ema.averages[0]:
        average.mul_(2.0).add_(0.01)
    (Path(folder) / "checkpoints").mkdir(exist_ok=True)
    manager = CheckpointManager(Path(folder) / "checkpoints", engine, ema, commit_timeout=60)
    for step in (1, 2):
        manager.save({"step": step, "updates": step})
    manager.finish(last=True)
    if mesh.rank == 0:
        (Path(folder) / "config.yaml").write_text(to_yaml(config))
    torch.distributed.barrier()
    engine.close()


def stirred_run(folder: str, *overrides: str) -> None:
    """A run directory with a checkpoint whose averages are far from the initial zeros, so that all layers count."""
    config = tiny(*overrides)
    engine = Engine(build(config, make_mesh()), config, make_mesh())
    ema = EMA(engine, [0.5])
    for number, average in enumerate(ema.averages[0]):
        average += torch.randn(average.shape, generator=torch.Generator().manual_seed(number)) * 0.15
    (Path(folder) / "checkpoints").mkdir()
    manager = CheckpointManager(Path(folder) / "checkpoints", engine, ema, commit_timeout=60)
    manager.save({"step": 3, "updates": 3})
    manager.finish(last=True)
    (Path(folder) / "config.yaml").write_text(to_yaml(config))
    engine.close()


def launched(store: str, port: int, function, request):
    """`function(request, launch)` on a rank that starts a job of its own, as under a launcher.

    Returns its result, or the text of the error that it raised on all ranks.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # a rank that leaves while others still connect would end them
    torch.distributed.destroy_process_group()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        result = function(request, LaunchEnvironment("torchrun", rank, world, rank, world, "127.0.0.1", port))
    except UserError as error:
        assert error.on_all_ranks
        result = f"{type(error).__name__}: {error}"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.distributed.barrier()
    return result


def as_job(world: int, folder: Path, function, request) -> list:
    """Results of `launched` by rank. `folder` holds the file in which the ranks meet again afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return processes.run(world, launched, str(folder / f"store {port}"), port, function, request)
