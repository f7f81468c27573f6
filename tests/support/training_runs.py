"""Short runs of the real training loop in a job of `support.processes`, and what they leave on disk."""

import json
from pathlib import Path

import torch
from support.trajectory import small

import megapromoe.training.loop as loop
from megapromoe.checkpoint.format import KINDS, Checkpoint
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.distributed import rendezvous, runtime

QUICK = ("train.log_every=1", "train.save_every=3", "train.steps=6", "train.keep_last=9")


def train(folder: str, *overrides: str) -> None:
    """`loop.train` of the small model (six steps, saved every three) in a job that is already running."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.HashStore()
    rendezvous.connect_all_ranks = lambda launch, timeout: store
    rendezvous.clone_connection = lambda store, timeout: store
    runtime.init_process_group = lambda launch, timeout, store: runtime.Job(torch.device("cpu"), store)
    runtime.destroy_process_group = lambda: None
    loop.train(small(*QUICK, *overrides), Path(folder), runtime.LaunchEnvironment("test", rank, world))


def state(folder: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """All logical tensors of a run's checkpoint by (kind, name)."""
    checkpoint = Checkpoint(folder_of(folder / "checkpoints", step))
    return {(kind, name): checkpoint.logical(kind, name) for kind in KINDS for name in checkpoint.shapes}


def same_state(folder: Path, other: Path, step: int) -> bool:
    """Whether the checkpoints of two runs hold the same bits."""
    tensors, others = state(folder, step), state(other, step)
    return tensors.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def losses(folder: Path) -> list[float]:
    """The total losses that a run logged, in order."""
    return [json.loads(line)["total_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
