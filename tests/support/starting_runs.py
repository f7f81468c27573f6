"""Starts of runs from checkpoints: the runs of a small model that they start from, and the weights that they get."""

from pathlib import Path

import torch
from support.golden_states import random_state

from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.conversion.starting_weights import StartingWeights, newest_checkpoint, open_start
from megapromoe.conversion.state import State, model_shapes
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.distributed.shard_ranges import ShardRange
from megapromoe.nn.parallelize import initial_values

SMALL = (
    *("model.hidden_size=32", "model.depth=2", "model.heads=2", "model.num_experts=4", "model.input_size=8"),
    *("model.in_channels=4", "model.num_classes=10", "data.source=synthetic", "data.size=64"),
)
TABLE = "y_embedder.embedding_table.weight"
MODELS = {
    "promoe": (),
    "promoe_ec": ("model.router=promoe_ec",),
    "dense": ("model.router=dense",),
    "conditional": ("model.router=conditional",),
    "tc": ("model.router=tc",),
    "diffmoe": ("model.router=diffmoe",),
    "kmeans": ("model.router=kmeans",),
    "race": ("model.router=race",),
    "gmm": ("model.router=gmm", "model.mixture_variance=isotropic"),
    "balance_bias": ("model.balance_bias=0.01",),
    "several": ("model.num_shared_experts=2", "model.num_unconditional_experts=2"),
    "no_unconditional": ("model.unconditional_expert=false",),
    "blocks": ("model.activation=swiglu", "model.norm=rms", "model.positions=rope", "model.modulation=shared"),
    "text": ("model.condition=text", "model.text_width=8", "model.text_tokens=4", "model.num_classes=1000"),
}


def config_of(*settings: str) -> Config:
    return resolve(overrides=[*SMALL, *settings])


def started(path: Path, *settings: str) -> tuple[StartingWeights, State]:
    """A start of a run with these settings from the checkpoint at a path, and the weights that it gets."""
    start = open_start(config_of(f"train.init_from={path}", *settings), newest_checkpoint(path))
    return start, start.state(start.prototypes() if start.needs_prototypes else {})


def initial(config: Config, name: str) -> torch.Tensor:
    out = torch.empty(model_shapes(config.model)[0][name])
    initial_values(config, UNSHARDED).write(name, out.view(-1))
    return out


def read(start: StartingWeights, state: State, name: str) -> torch.Tensor:
    """A weight, as a rank without parallelism reads it."""
    out = torch.full(state.shapes[name], 7.0)
    start.read_into(state, name, ShardRange.of_tensor(tuple(out.shape)), out.view(-1))
    return out


def saved_run(folder: Path, *settings: str) -> tuple[Path, State]:
    made = random_state(config_of(*settings))
    export(made, folder / "source", "ours")
    return folder / "source", made
