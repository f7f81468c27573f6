"""Counts the bytes that ranks send for one MoE layer, in a small gloo job, and compares them with the bound.

Messages do not depend on the machine, so they are counted in CPU processes also if timings are taken on a GPU. The
bound is exact: each row whose expert is on another rank is sent there and back, and so is its gradient.
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
from megapromoe.nn.moe.auxiliary import auxiliary_losses
from megapromoe.nn.moe.layer import auxiliary_of

CONTENDERS = ("ours", "deepspeed-capacity", "deepspeed-nodrop")  # those that have expert parallelism
MINUTES = 5


def measure_traffic(config: Config, routing: str, settings: Settings, ranks: int) -> dict:
    """Counts the messages of one layer, forward and backward, of `ranks` expert-parallel processes.

    Returns JSON: "contenders" name -> phase -> {"collectives", "sent", "bound"}, with bytes summed over the ranks, or
    {"cannot": reason}. Phases are "route" (the router and its statistics), "forward", "losses" and "backward".
    """
    names = [name for name in settings.contenders if name in CONTENDERS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, config, routing, settings, names)
        multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="spawn")
        ranks_counts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    merged = {name: merge_ranks([counts[name] for counts in ranks_counts]) for name in names}
    return {"contenders": merged, "ranks": ranks}


def _rank(rank: int, ranks: int, folder: str, config: Config, routing: str, settings: Settings, names: list) -> None:
    torch.set_num_threads(1)
    runtime.prepare()
    store, timeout = f"file://{folder}/store", timedelta(minutes=MINUTES)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        counts = {name: count_messages(name, config, routing, settings) for name in names}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(counts))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def count_messages(name: str, config: Config, routing: str, settings: Settings) -> dict:
    """This rank's messages: phase -> "collectives" (name -> calls), "sent" (name -> bytes), "bound" (bytes).

    Collective.
    """
    mesh = make_mesh(ep=dist.get_world_size())
    settings = replace(settings, device=torch.device("cpu"), seed=settings.seed + 1000 * mesh.rank)
    moe, x_BSD = first_layer(config, routing, settings, mesh)
    check_load(moe, x_BSD, settings.pattern(routing), settings.num_conditional)
    other: BaselineWrapper | None = None
    if name != "ours":
        from megapromoe.benchmark.deepspeed_moe import DeepSpeedLayer  # slow to import

        try:
            other = DeepSpeedLayer(moe, drops=name == "deepspeed-capacity", ep=mesh.world_size).train()
        except CannotRun as error:
            return {"cannot": str(error)}
    moe.train()
    with Counter() as counter:
        counter.phase("route")
        if other is None:
            inputs, routed = moe.route(x_BSD, settings.num_conditional)
            counter.phase("forward")
            y_BSD, dropped = moe.run_experts(*inputs)
            auxiliary = auxiliary_of(routed, dropped)
        else:  # its gate is a part of the layer
            counter.phase("forward")
            y_BSD, auxiliary = other(x_BSD, settings.num_conditional)
        counter.phase("losses")
        losses = auxiliary_losses([auxiliary]).values()
        counter.phase("backward")
        (y_BSD.sum() + sum(loss.sum() for loss in losses)).backward()
    with torch.no_grad():
        expert_R = moe.route(x_BSD, settings.num_conditional)[0].assignment.expert_R
    owner_R = torch.tensor(moe.dispatcher.placement.rank_of_expert)[expert_R]
    bound = int((owner_R != mesh.ep.rank).sum()) * 2 * x_BSD.shape[-1] * x_BSD.element_size()
    messages: dict[str, dict[str, Any]] = {}
    for phase, counts in counter.phases.items():
        messages[phase] = {"collectives": dict(counts.collectives), "sent": dict(counts.sent)}
        messages[phase]["bound"] = bound if phase in ("forward", "backward") else 0
    return messages


def merge_ranks(ranks_counts: list[dict]) -> dict:
    """The counts of all ranks together: bytes are added up, collectives are the same on every rank."""
    if "cannot" in ranks_counts[0]:
        return ranks_counts[0]
    merged = {}
    for phase, first in ranks_counts[0].items():
        ranks = [counts[phase] for counts in ranks_counts]
        kinds = sorted({kind for rank in ranks for kind in rank["sent"]})
        merged[phase] = {
            "collectives": first["collectives"],
            "sent": {kind: sum(rank["sent"].get(kind, 0) for rank in ranks) for kind in kinds},
            "bound": sum(rank["bound"] for rank in ranks),
        }
    return merged
