"""Converted checkpoints go on training, in ours and in DeepSpeed's own loader."""

from pathlib import Path

import torch
from support.golden_states import PUBLISHED, config_that_runs, state_of
from support.processes import run
from support.published_run import assert_reproduced, config, train

from megapromoe.checkpoint.format import KINDS, Checkpoint
from megapromoe.checkpoint.manager import resume
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build


def continue_run(folder: Path) -> dict:
    checkpoint = Checkpoint(next((folder / "checkpoints").iterdir()))
    checkpoint.verify()
    state = {kind: {name: checkpoint.logical(kind, name) for name in checkpoint.shapes} for kind in KINDS}
    return train(3, 6, state)


def resumed(folder: Path) -> dict:
    """What the trainer's own resume puts into an engine."""
    mesh = make_mesh()
    engine = Engine(build(config(), mesh), config(), mesh)
    ema = EMA(engine, [0.9999])
    manifest = resume(folder / "checkpoints", engine, ema).checkpoint.manifest
    held = {}
    for partition, average in zip(engine.partitions, ema.averages[0], strict=True):
        flats = {"master": partition.master, "ema": average, **engine.moments(partition)}
        for p in partition.pieces:
            for kind, flat in flats.items():
                part = flat[p.offset : p.offset + p.stop - p.start].detach().clone()
                held[kind, p.name, p.start] = part
    engine.close()
    return {"step": manifest["step"], "updates": manifest["updates"], "held": held}


def test_the_published_run_continues_from_its_conversion(tmp_path):
    export(open_state(PUBLISHED, config=config_that_runs()), tmp_path / "run", "ours")
    assert_reproduced(run(1, continue_run, tmp_path / "run")[0], 3)
    results = run(2, resumed, tmp_path / "run")
    state = open_state(tmp_path / "run")
    pieces = results[0]["held"] | results[1]["held"]
    assert results[0]["step"] == results[0]["updates"] == 3
    assert sum(piece.numel() for piece in pieces.values()) == state.nbytes // 4
    for (kind, name, start), piece in pieces.items():
        assert torch.equal(state.read(kind, name).view(-1)[start : start + piece.numel()], piece), (kind, name)


def read_by_deepspeed(folder: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's own loader puts into a model with DeepSpeed's own MoE layers."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    expert = torch.nn.Sequential()
    expert.add_module("fc1", torch.nn.Linear(32, 64))
    expert.add_module("fc2", torch.nn.Linear(64, 32))
    blocks = [torch.nn.Module() for _ in range(4)]
    for block in blocks:
        block.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(32, 192))
    for block in blocks[1::2]:
        block.mlp = MoE(32, expert, num_experts=4, ep_size=1)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(blocks)
    group = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(group))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 1})
    # Not strict: this stand-in has only some of the model's parts, and gates that we do not have.
    engine.load_checkpoint(str(folder), load_module_strict=False, load_optimizer_states=False)
    return {name: p.detach().clone() for name, p in model.named_parameters()} | {"step": engine.global_steps}


def test_deepspeed_reads_the_folder(tmp_path):
    state = state_of("promoe_tc")
    export(state, tmp_path / "deep", "deepspeed")
    read = run(1, read_by_deepspeed, tmp_path / "deep")[0]
    assert read["step"] == 12
    for block in (1, 3):
        experts = f"blocks.{block}.mlp.deepspeed_moe.experts.deepspeed_experts"
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            for e, ours in enumerate(state.read("master", f"blocks.{block}.mlp.experts.{part}")):
                assert torch.equal(read[f"{experts}.{e}.{part}"], ours)
        name = f"blocks.{block}.adaLN_modulation.1.weight"
        assert torch.equal(read[name], state.read("master", name))
