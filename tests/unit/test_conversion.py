"""Checkpoints of every format: converted there and back to the bit, streamed, inspected."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.golden_cases import CASES, tensors_of
from support.golden_states import NAMES, PUBLISHED, config_that_runs, state_of
from support.processes import run
from test_published_run import assert_reproduced, config, train

from megapromoe.checkpoint.format import KINDS, Checkpoint
from megapromoe.cli import main
from megapromoe.config.resolve import to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.published_names import constants
from megapromoe.conversion.state import State, model_shapes
from megapromoe.conversion.stream import read_pickle


def assert_same(one: State, other: State, kinds: tuple[str, ...] = KINDS) -> None:
    assert (one.step, one.config) == (other.step, other.config)
    assert list(one.shapes) == list(other.shapes)
    for kind in kinds:
        for name in one.shapes:
            assert torch.equal(one.read(kind, name), other.read(kind, name)), (kind, name)
    assert one.buffers.keys() == other.buffers.keys()
    assert all(torch.equal(one.buffers[name], other.buffers[name]) for name in one.buffers)


@pytest.mark.parametrize("form", ["ours", "published", "safetensors", "deepspeed"])
@pytest.mark.parametrize("case", CASES)
def test_all_state_comes_back_to_the_bit(tmp_path, case, form):
    state = state_of(case)
    there = tmp_path / NAMES[form]
    assert export(state, there, form) == []
    given = state.config if form == "published" else None
    back = open_state(there, config=given)
    assert back.format == form and back.updates == 10 and back.notes == []
    assert_same(state, back)


@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
@pytest.mark.parametrize("weights", ["ema", "master"])
def test_weights_alone_come_back_to_the_bit(tmp_path, form, weights):
    state = state_of("diffmoe")
    export(state, tmp_path / NAMES[form], form, weights)
    back = open_state(tmp_path / NAMES[form])
    assert back.kinds == ("master", "ema") and back.updates == 0
    for kind in back.kinds:
        for name in state.shapes:
            assert torch.equal(back.read(kind, name), state.read(weights, name))
    assert torch.equal(back.buffers["blocks.1.mlp.router.threshold"], state.buffers["blocks.1.mlp.router.threshold"])


@pytest.mark.parametrize("case", CASES)
def test_published_names_are_those_of_the_release(tmp_path, case):
    export(state_of(case), tmp_path / "a.pth", "published")
    model = torch.load(tmp_path / "a.pth", weights_only=True, mmap=True)["model_state_dict"]
    theirs = tensors_of(case, "param")
    computed = {name for name in model if name.endswith(("expert_threshold", "ema_decay"))}
    assert model.keys() - computed == theirs.keys()
    assert all(torch.equal(model[name], theirs[name]) for name in theirs)
    assert len(computed) == (4 if case == "diffmoe" else 0)


def test_the_published_run_goes_there_and_back_to_the_bit(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config_that_runs()))
    assert main(["convert", str(PUBLISHED), str(tmp_path / "run"), "--to", "ours", "--config", str(path)]) == 0
    last = "run"
    for form in ("safetensors", "deepspeed", "published"):
        assert main(["convert", str(tmp_path / last), str(tmp_path / NAMES[form]), "--to", form]) == 0
        last = NAMES[form]
    theirs, ours = (torch.load(p, weights_only=True) for p in (PUBLISHED, tmp_path / last))
    assert list(theirs) == list(ours) and theirs["step"] == ours["step"]
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert list(theirs[key]) == list(ours[key])
        assert all(torch.equal(theirs[key][n], ours[key][n]) for n in theirs[key]), key
    a, b = (one["optimizer_state_dict"]["state"] for one in (theirs, ours))
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    shapes = {name: tensor.shape for name, tensor in ours["model_state_dict"].items()}
    model = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes.values()]
    torch.optim.AdamW(model).load_state_dict(ours["optimizer_state_dict"])


def continue_run(folder: Path) -> dict:
    checkpoint = Checkpoint(next((folder / "checkpoints").iterdir()))
    checkpoint.verify()
    state = {kind: {name: checkpoint.logical(kind, name) for name in checkpoint.shapes} for kind in KINDS}
    return train(3, 6, state)


def resumed(folder: Path) -> dict:
    """What the trainer's own resume puts into an engine."""
    from megapromoe.checkpoint.manager import resume
    from megapromoe.distributed.mesh import make_mesh
    from megapromoe.engine.averaged_weights import EMA
    from megapromoe.engine.engine import Engine
    from megapromoe.nn.parallelize import build

    mesh = make_mesh()
    engine = Engine(build(config(), mesh), config(), mesh)
    ema = EMA(engine, 0.9999)
    manifest = resume(folder / "checkpoints", engine, ema).manifest
    held = {}
    for partition, average in zip(engine.partitions, ema.averages, strict=True):
        flats = {"master": partition.master, "ema": average, **engine.moments(partition)}
        for p in partition.pieces:
            for kind, flat in flats.items():
                part = flat[p.offset : p.offset + p.stop - p.start].detach().clone()
                held[kind, p.name, p.start] = part
    engine.close()
    return {"step": manifest["step"], "updates": manifest["updates"], "held": held}


def test_the_published_run_goes_on_from_its_conversion(tmp_path):
    export(open_state(PUBLISHED, config=config_that_runs()), tmp_path / "run", "ours")
    assert_reproduced(run(1, continue_run, tmp_path / "run")[0], 3)
    said = run(2, resumed, tmp_path / "run")
    state = open_state(tmp_path / "run")
    pieces = said[0]["held"] | said[1]["held"]
    assert said[0]["step"] == said[0]["updates"] == 3
    assert sum(piece.numel() for piece in pieces.values()) == state.nbytes // 4
    for (kind, name, start), piece in pieces.items():
        assert torch.equal(state.read(kind, name).view(-1)[start : start + piece.numel()], piece), (kind, name)


def test_readers_of_other_projects_read_what_is_written(tmp_path):
    state = state_of("promoe_tc")
    export(state, tmp_path / "folder", "diffusers")
    said = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert said["_class_name"] == "DiT" and said["hidden_size"] == 32 and said["router"] == "promoe"
    tensors = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[name], state.read("ema", name)) for name in state.shapes)
    export(state, tmp_path / "a.safetensors", "safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["megapromoe"])["config"]["model"]["hidden_size"] == 32
    export(state, tmp_path / "a.pth", "published")
    assert zipfile.ZipFile(tmp_path / "a.pth").testzip() is None
    for mmap in (True, False):
        tree = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        position = constants(state.config.model)["pos_embed"]
        assert torch.equal(tree["model_state_dict"]["pos_embed"], position)


def test_the_deepspeed_folder_has_the_names_of_deepspeed(tmp_path):
    from deepspeed.runtime.engine import DeepSpeedEngine

    state = state_of("promoe_tc")
    export(state, tmp_path / "deep", "deepspeed")
    tag = (tmp_path / "deep" / "latest").read_text()
    for expert in range(4):
        file = Path(DeepSpeedEngine._get_expert_ckpt_name(tmp_path / "deep", 1, expert, tag))
        name = f"blocks.3.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.fc1.weight"
        tensors = torch.load(file, weights_only=True)
        assert torch.equal(tensors[name], state.read("master", "blocks.3.mlp.experts.fc1.weight")[expert])
        assert len(tensors) == 4
    main = torch.load(tmp_path / "deep" / tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert main["num_experts"] == [4, 4] and main["global_steps"] == 12
    assert not [name for name in main["module"] if ".experts." in name]


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


def test_weights_without_optimizer_start_with_empty_moments(tmp_path):
    tree = torch.load(PUBLISHED, weights_only=True)
    torch.save(tree["model_state_dict"], tmp_path / "bare.pth")
    state = open_state(tmp_path / "bare.pth", config=config_that_runs())
    assert state.step == 0 and any("no optimizer state" in note for note in state.notes)
    notes = export(state, tmp_path / "run", "ours")
    assert any("moments" in note for note in notes)
    back = open_state(tmp_path / "run")
    assert back.updates == 0 and not back.read("exp_avg", "final_layer.linear.weight").any()
    weight = tree["model_state_dict"]["final_layer.linear.weight"]
    assert torch.equal(back.read("ema", "final_layer.linear.weight"), weight)


def test_what_lists_without_a_config(capsys):
    assert main(["convert", str(PUBLISHED), "--what"]) == 0
    said = capsys.readouterr().out
    assert "step: 3" in said and "format: published" in said and "config: none" in said
    assert "ema_model_state_dict.blocks.3.mlp.cluster_centers" in said and "4x32" in said
    tensors = sum(1 for _ in said.splitlines()) - 4
    assert f"{tensors} tensors" in said and tensors == 2 * 94 + 3 * 93


def test_views_and_strides_of_a_saved_tensor_are_read_as_they_are(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    torch.save(
        {"a": whole.T, "b": whole[1:3, 2:4], "c": whole[2], "d": torch.zeros(0, 3), "e": whole}, tmp_path / "x.pt"
    )
    tree = read_pickle(tmp_path / "x.pt")
    for name, tensor in torch.load(tmp_path / "x.pt", weights_only=True).items():
        assert torch.equal(tree[name].read(), tensor), name
        out = torch.empty_like(tensor, dtype=torch.float64, memory_format=torch.contiguous_format)
        tree[name].read_into(out)
        assert torch.equal(out, tensor.double()), name


def test_inspection_finds_the_one_tensor_that_differs(tmp_path, capsys):
    state = state_of("promoe_tc")
    export(state, tmp_path / "run", "ours")

    def read(kind: str, name: str) -> torch.Tensor:
        tensor = state.read(kind, name).clone()
        if (kind, name) == ("ema", "final_layer.linear.bias"):
            tensor[3] += 0.5
        return tensor

    export(replace(state, read=read), tmp_path / "b.pth", "published")
    assert main(["inspect", str(tmp_path / "run"), str(tmp_path / "b.pth"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (found,) = [one for one in said["differences"] if one["largest"] > 0]
    assert (found["name"], found["kind"]) == ("final_layer.linear.bias", "ema")
    norm = float(state.read("ema", "final_layer.linear.bias").norm())
    assert found["largest"] == pytest.approx(0.5, rel=1e-5)
    assert found["relative"] == pytest.approx(0.5 / norm, rel=1e-5)
    assert main(["inspect", str(tmp_path / "b.pth"), str(tmp_path / "run")]) == 0
    count = 4 * len(state.shapes)
    assert f"{count - 1} of {count} tensors are equal to the bit" in capsys.readouterr().out

    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layout"].startswith("1 rank files") and said["step"] == 12
    for name in state.shapes:
        for kind in KINDS:
            assert said["tensors"][name]["norm"][kind] == pytest.approx(float(state.read(kind, name).norm()), rel=1e-5)
    assert main(["inspect", str(tmp_path / "b.pth")]) == 1
    assert "--config FILE" in capsys.readouterr().err


# A model of 35 MB with all its state, converted in a process of its own that reports the growth of its memory.
MEASURE = """
import sys
import megapromoe.conversion.exports, megapromoe.conversion.formats, torch, tqdm
from megapromoe.cli import main
torch.set_num_threads(1)
tiny = sys.argv[1:4] + sys.argv[6:]
assert main(["convert", *tiny]) == 0
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # getrusage's has the parent's
before = peak()
assert main(["convert"] + sys.argv[4:6] + sys.argv[3:4] + sys.argv[6:]) == 0
print("GROWTH", (peak() - before) * 1024)
"""


def growth(tiny: Path, source: Path, target: Path, form: str, *more: str) -> int:
    """Bytes of memory that a conversion needs beyond those that a tiny one needed."""
    small = target.with_name(f"tiny-{target.name}")
    words = [str(tiny), str(small), f"--to={form}", str(source), str(target), *more]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("GROWTH")[1])


def test_memory_stays_far_below_one_copy_of_the_model(tmp_path):
    config = config_that_runs("promoe_tc")
    model = replace(config.model, hidden_size=192, depth=12, num_experts=4)
    state = state_of("promoe_tc")
    export(state, tmp_path / "tiny.safetensors", "safetensors")
    shapes, _ = model_shapes(model)
    big = replace(state, config=replace(config, model=model), shapes=shapes, read=lambda k, n: torch.ones(shapes[n]))
    export(big, tmp_path / "big.safetensors", "safetensors")
    one = big.nbytes // 4
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    assert (tmp_path / "big.safetensors").stat().st_size > 100e6 and one > 10 * largest
    tiny, source = tmp_path / "tiny.safetensors", tmp_path / "big.safetensors"
    for form in ("ours", "published"):
        used = growth(tiny, source, tmp_path / NAMES[form], form)
        assert used < 4 * largest + one / 4, f"{form}: {used:,} bytes for a model of {one:,}"
        tiny, source = tmp_path / f"tiny-{NAMES[form]}", tmp_path / NAMES[form]
