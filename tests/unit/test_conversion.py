"""Checkpoints of every format: converted there and back to the bit, streamed, inspected."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.golden_cases import CASES, tensors_of
from support.golden_states import NAMES, PUBLISHED, config_that_runs, random_state, state_of
from support.levels import full

from megapromoe.checkpoint.format import KINDS
from megapromoe.cli import main
from megapromoe.config.resolve import to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.published_names import constants
from megapromoe.conversion.state import State
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.planning.cost import parameters


def assert_same(first: State, second: State, kinds: tuple[str, ...] = KINDS) -> None:
    assert (first.step, first.config) == (second.step, second.config)
    assert list(first.shapes) == list(second.shapes)
    for kind in kinds:
        for name in first.shapes:
            assert torch.equal(first.read(kind, name), second.read(kind, name)), (kind, name)
    assert first.buffers.keys() == second.buffers.keys()
    assert all(torch.equal(first.buffers[name], second.buffers[name]) for name in first.buffers)


FORMS = ("ours", "published", "safetensors", "deepspeed")
# At the quick level every case in one form, which changes from case to case.
STATES = [
    (case, form) if form == FORMS[number % len(FORMS)] else full(case, form)
    for number, case in enumerate(CASES)
    for form in FORMS
]


@pytest.mark.parametrize("case, form", STATES)
def test_all_state_is_restored_bit_for_bit(tmp_path, case, form):
    state = state_of(case)
    destination = tmp_path / NAMES[form]
    assert export(state, destination, form) == []
    given = state.config if form == "published" else None
    back = open_state(destination, config=given)
    assert back.format == form and back.updates == 10 and back.notes == []
    assert_same(state, back)


@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
@pytest.mark.parametrize("weights", ["ema", "master"])
def test_weights_alone_are_restored_bit_for_bit(tmp_path, form, weights):
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


@pytest.mark.parametrize("form", ["ours", "published", "safetensors", "deepspeed"])
@pytest.mark.parametrize("unconditional", [1, 2])
def test_several_dense_experts_are_restored_bit_for_bit(tmp_path, form, unconditional):
    """Also of widths of their own; in published files under names made like those of the release."""
    config = config_that_runs("promoe_tc")
    several = {"num_shared_experts": 3, "shared_expert_width": 20, "num_unconditional_experts": unconditional}
    state = random_state(replace(config, model=replace(config.model, **several)))
    destination = tmp_path / NAMES[form]
    assert export(state, destination, form) == []
    back = open_state(destination, config=state.config if form == "published" else None)
    assert back.updates == 10 and back.notes == []
    assert_same(state, back)
    if form == "published":
        tree = torch.load(destination, weights_only=True)
        shapes = {
            name: tuple(t.shape) for name, t in tree["model_state_dict"].items() if name.startswith("blocks.3.mlp")
        }
        assert [n for n in shapes if "shared" in n] == [
            f"blocks.3.mlp.shared_experts.{i}.{projection}_proj.{kind}"
            for i in range(3) for projection in ("up", "down") for kind in ("weight", "bias")
        ]  # fmt: skip
        assert shapes["blocks.3.mlp.shared_experts.2.up_proj.weight"] == (20, 32)
        last = state.read("master", "blocks.3.mlp.unconditional" + (".1" if unconditional == 2 else "") + ".fc2.bias")
        assert torch.equal(tree["model_state_dict"][f"blocks.3.mlp.experts.{3 + unconditional}.down_proj.bias"], last)
        assert f"blocks.3.mlp.experts.{4 + unconditional}.down_proj.bias" not in shapes


BLOCKS = {"activation": "swiglu", "norm": "rms", "qk_norm": "rms", "positions": "rope", "modulation": "shared"}


TEXT = {"condition": "text", "num_classes": 1000, "text_width": 6, "text_tokens": 5, "text_ffn": 24}


@pytest.mark.parametrize("form", ["ours", "safetensors", "deepspeed", "diffusers"])
def test_options_of_blocks_and_texts_are_restored_bit_for_bit(tmp_path, form):
    config = config_that_runs("promoe_tc")
    data = replace(config.data, source="unset")
    state = random_state(replace(config, data=data, model=replace(config.model, **BLOCKS, **TEXT)))
    export(state, tmp_path / NAMES[form], form)
    back = open_state(tmp_path / NAMES[form])
    assert back.config.model == state.config.model
    if form == "diffusers":
        assert all(torch.equal(back.read("master", name), state.read("ema", name)) for name in state.shapes)
    else:
        assert_same(state, back)


@pytest.mark.parametrize("option, value", [*BLOCKS.items(), ("condition", "text")])
def test_options_of_blocks_that_published_files_cannot_express_are_refused(tmp_path, option, value):
    config = config_that_runs("promoe_tc")
    state = random_state(replace(config, model=replace(config.model, **{option: value})))
    with pytest.raises(ConversionError, match=rf"does not support model.{option} = {value}; use another format"):
        export(state, tmp_path / "a.pth", "published")
    assert not (tmp_path / "a.pth").exists()


def test_the_published_run_is_converted_in_both_directions_bit_for_bit(tmp_path):
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
    a, b = (tree["optimizer_state_dict"]["state"] for tree in (theirs, ours))
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    shapes = {name: tensor.shape for name, tensor in ours["model_state_dict"].items()}
    model = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes.values()]
    torch.optim.AdamW(model).load_state_dict(ours["optimizer_state_dict"])


def test_readers_of_other_projects_read_what_is_written(tmp_path):
    state = state_of("promoe_tc")
    export(state, tmp_path / "folder", "diffusers")
    model = tmp_path / "folder" / "transformer"
    content = json.loads((model / "config.json").read_text())
    assert content["_class_name"] == "ProMoETransformer2DModel"
    assert content["hidden_size"] == 32 and content["router"] == "promoe"
    tensors = load_file(model / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[f"dit.{name}"], state.read("ema", name)) for name in state.shapes)
    export(state, tmp_path / "a.safetensors", "safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["megapromoe"])["config"]["model"]["hidden_size"] == 32
    export(state, tmp_path / "a.pth", "published")
    assert zipfile.ZipFile(tmp_path / "a.pth").testzip() is None
    for mmap in (True, False):
        tree = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        position = constants(state.config.model)["pos_embed"]
        assert torch.equal(tree["model_state_dict"]["pos_embed"], position)


def test_folders_of_the_former_form_are_read(tmp_path):
    """One config.json and one file, with our names; diffusers could not open them."""
    state, folder = state_of("diffmoe"), tmp_path / "folder"
    export(state, tmp_path / "new", "diffusers", "master")
    content = json.loads((tmp_path / "new" / "transformer" / "config.json").read_text())
    content |= {"_class_name": "DiT", "megapromoe": content.pop("_megapromoe")}
    del content["_diffusers_version"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {name: state.read("master", name) for name in state.shapes}
    save_file(tensors | state.buffers, folder / "diffusion_pytorch_model.safetensors")
    back = open_state(folder)
    assert (back.format, back.step, back.config) == ("diffusers", 12, state.config)
    assert all(torch.equal(back.read("ema", name), tensors[name]) for name in tensors)
    assert all(torch.equal(back.buffers[name], state.buffers[name]) for name in state.buffers)
    export(state, folder, "diffusers", overwrite=True)
    assert (folder / "model_index.json").exists() and not (folder / "config.json").exists()


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
    content = capsys.readouterr().out
    assert "step: 3" in content and "format: published" in content and "config: none" in content
    assert "ema_model_state_dict.blocks.3.mlp.cluster_centers" in content and "4x32" in content
    tensors = sum(1 for _ in content.splitlines()) - 4
    assert f"{tensors} tensors" in content and tensors == 2 * 94 + 3 * 93


def test_views_and_strides_of_a_saved_tensor_are_read_as_they_are(tmp_path):
    table = torch.arange(24.0).view(4, 6)
    torch.save(
        {"a": table.T, "b": table[1:3, 2:4], "c": table[2], "d": torch.zeros(0, 3), "e": table}, tmp_path / "x.pt"
    )
    tree = read_pickle(tmp_path / "x.pt")
    for name, tensor in torch.load(tmp_path / "x.pt", weights_only=True).items():
        assert torch.equal(tree[name].read(), tensor), name
        out = torch.empty_like(tensor, dtype=torch.float64, memory_format=torch.contiguous_format)
        tree[name].read_into(out)
        assert torch.equal(out, tensor.double()), name


def test_inspection_does_not_claim_updates_of_converted_weights(tmp_path, capsys):
    state = state_of("promoe_tc")
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    export(state, weights, "safetensors", "ema")
    export(open_state(weights), run, "ours")
    for path, text in ((weights, "weights without moments"), (run, "converted, with moments that start at zero")):
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"{text}: updates not known" in out and "0 updates" not in out
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["updates"] is None
    count = parameters(state.config.model)
    assert f"{count.total:,} parameters ({count.trainable:,} trained" in out


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
    content = json.loads(capsys.readouterr().out)
    (difference,) = [entry for entry in content["differences"] if entry["largest"] > 0]
    assert (difference["name"], difference["kind"]) == ("final_layer.linear.bias", "ema")
    norm = float(state.read("ema", "final_layer.linear.bias").norm())
    assert difference["largest"] == pytest.approx(0.5, rel=1e-5)
    assert difference["relative"] == pytest.approx(0.5 / norm, rel=1e-5)
    assert main(["inspect", str(tmp_path / "b.pth"), str(tmp_path / "run")]) == 0
    count = 4 * len(state.shapes)
    assert f"{count - 1} of {count} tensors are equal to the bit" in capsys.readouterr().out

    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["layout"].startswith("1 rank files") and content["step"] == 12
    assert content["updates"] == 10 and content["parameters"] == parameters(state.config.model).total
    assert content["trained_parameters"] == sum(math.prod(shape) for shape in state.shapes.values())
    for name in state.shapes:
        for kind in KINDS:
            assert content["tensors"][name]["norm"][kind] == pytest.approx(
                float(state.read(kind, name).norm()), rel=1e-5
            )
    assert main(["inspect", str(tmp_path / "b.pth")]) == 1
    assert "--config FILE" in capsys.readouterr().err
