"""What travels between ranks for one MoE layer, counted in a small job of gloo processes and compared with the bound.

Messages are the same on every machine, so they are counted on CPU processes, whatever the timings are taken on. The
bound is exact: each row whose expert lives on another rank goes there and comes back, and so does its gradient.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from megapromoe.benchmark.baseline_wrapper import BaselineWrapper, CannotRun
from megapromoe.benchmark.counters import Counter
from megapromoe.benchmark.layer import Settings, check_load, first_layer
from megapromoe.config.options import Config
from megapromoe.distributed import runtime
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.parameter_layout import ExpertPlacement
from megapromoe.nn.moe.layer import MoE

CONTENDERS = ("ours", "deepspeed-capacity", "deepspeed-nodrop")  # those that can spread experts over ranks
MINUTES = 5


def measure_traffic(config: Config, routing: str, settings: Settings, ranks: int) -> dict:
    """Counts one layer's forward and backward on `ranks` expert-parallel processes, each with a batch of its own.

    Returns JSON: "contenders" name -> {"collectives", "sent", "bound"} by phase ("route": the router with its
    statistics over all ranks; "forward", "backward"), bytes summed over the ranks; or {"cannot": reason}.
    """
    names = [name for name in settings.contenders if name in CONTENDERS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, config, routing, settings, names)
        multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="spawn")
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {"contenders": {name: merged([one[name] for one in told]) for name in names}, "ranks": ranks}


def _rank(rank: int, ranks: int, folder: str, config: Config, routing: str, settings: Settings, names: list) -> None:
    torch.set_num_threads(1)
    runtime.prepare()
    meet, limit = f"file://{folder}/store", timedelta(minutes=MINUTES)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks, timeout=limit)
    try:
        told = {name: count(name, config, routing, settings) for name in names}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def count(name: str, config: Config, routing: str, settings: Settings) -> dict:
    """This rank's messages; collective, all ranks of the running job call it."""
    mesh = make_mesh(ep=dist.get_world_size())
    settings = replace(settings, device=torch.device("cpu"), seed=settings.seed + 1000 * mesh.rank)
    moe, x_BSD = first_layer(config, routing, settings, mesh)
    check_load(moe, x_BSD, routing, settings.conditional)
    layer: MoE | BaselineWrapper = moe
    if name != "ours":
        from megapromoe.benchmark.deepspeed_moe import DeepSpeedLayer  # slow to import

        try:
            layer = DeepSpeedLayer(moe, drops=name == "deepspeed-capacity", ep=mesh.world)
        except CannotRun as error:
            return {"cannot": str(error)}
    layer.train()
    with Counter() as counter:
        counter.phase("route")
        routed = layer.route(x_BSD, settings.conditional)
        counter.phase("forward")
        y_BSD = layer(x_BSD, routed, settings.conditional)
        counter.phase("losses")
        losses = layer.losses_of([routed]).values()
        counter.phase("backward")
        (y_BSD.sum() + sum(loss.sum() for loss in losses)).backward()
    with torch.no_grad():
        expert_R = moe.route(x_BSD, settings.conditional).route.expert_R
    owner_R = (
        ExpertPlacement(config.model.num_experts, mesh.world).slot_E()[expert_R] // moe.experts.fc1.weight.shape[0]
    )
    away = int((owner_R != mesh.ep.rank).sum()) * 2 * x_BSD.shape[-1] * x_BSD.element_size()
    said: dict[str, dict[str, Any]] = {}
    for phase, counts in counter.phases.items():
        said[phase] = {"collectives": dict(counts.collectives), "sent": dict(counts.sent)}
        said[phase]["bound"] = away if phase in ("forward", "backward") else 0
    return said


def merged(told: list[dict]) -> dict:
    """The ranks' counts as one: bytes added up; collectives are the same on all."""
    if "cannot" in told[0]:
        return told[0]
    said = {}
    for phase, first in told[0].items():
        ranks = [one[phase] for one in told]
        kinds = sorted({kind for rank in ranks for kind in rank["sent"]})
        said[phase] = {
            "collectives": first["collectives"],
            "sent": {kind: sum(rank["sent"].get(kind, 0) for rank in ranks) for kind in kinds},
            "bound": sum(rank["bound"] for rank in ranks),
        }
    return said
