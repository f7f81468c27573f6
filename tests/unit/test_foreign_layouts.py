"""Files as other projects write them, read to the bit or refused with the reason; docs/convert.md has this table."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.foreign_files import KINDS, UPDATES, config, tensors
from support.foreign_layouts import LAYOUTS
from support.golden_states import state_of

from megapromoe.cli import main
from megapromoe.config.options import Config, to_dict
from megapromoe.config.resolve import to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.foreign import deepspeed_names
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.state import State, config_from
from megapromoe.conversion.stream import ConversionError

DOCUMENT = Path(__file__).parents[2] / "docs" / "convert.md"
READ = {name: layout for name, layout in LAYOUTS.items() if not layout.refused}
DIFFUSERS = {name for name, layout in LAYOUTS.items() if "diffusers." in layout.make.__qualname__}
REFUSED = {name: layout for name, layout in LAYOUTS.items() if layout.refused}


def given(name: str) -> Config | None:
    """The config that a layout is opened with: none where it says itself which model it is of."""
    return None if name in DIFFUSERS else config()


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_read_to_the_bit(tmp_path, name):
    layout = READ[name]
    state = open_state(layout.make(tmp_path), config=given(name))
    assert list(state.shapes) == list(tensors()["master"]) and layout.how.startswith(("read", "refused when"))
    for kind in layout.kinds:
        for parameter, tensor in tensors()[kind].items():
            expected = tensor.to(layout.rounding).float()
            if state.config.model.time_input == "sit" and parameter.startswith("final_layer.linear"):
                expected = expected if kind == "exp_avg_sq" else -expected
            assert torch.equal(state.read(kind, parameter), expected), (kind, parameter)
    match = re.search(r"model.time_input=(\w+)", layout.how)
    assert state.config.model.time_input == (match[1] if match else "dit")
    assert (state.config.diffusion.objective == "ddpm") == ("DDPM" in layout.how or name in DIFFUSERS)
    assert state.updates == (UPDATES if "exp_avg" in layout.kinds else 0)
    for words in layout.notes:
        assert any(words in note for note in state.notes), (words, state.notes)
    assert not state.buffers and config_from(to_dict(state.config)) == state.config


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_with_the_reason(tmp_path, name):
    layout = REFUSED[name]
    path = layout.make(tmp_path)
    with pytest.raises(ConversionError) as error:
        open_state(path, config=given(name))
    message = str(error.value)
    assert re.search(layout.refused, message), message
    assert layout.how.startswith("refused") and len(message) < 1500 and str(tmp_path) in message


def test_the_documentation_has_these_layouts():
    rows = re.findall(r"^\| (.*?) \| ((?:read|refused)[^|]*?) \|$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert rows == [(name, layout.how) for name, layout in LAYOUTS.items()]


def test_nan_is_refused_with_the_tensor_name_and_accepted_with_an_option(tmp_path, capsys):
    path = LAYOUTS["NaN or infinity in any of them"].make(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config()))
    command = ["convert", str(path), str(tmp_path / "run"), "--to", "ours", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 1
    assert "master of final_layer.linear.bias holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--allow-nonfinite"]) == 0
    assert "note: master of final_layer.linear.bias holds NaN" in capsys.readouterr().out
    assert open_state(tmp_path / "run").read("ema", "final_layer.linear.bias").isnan().all()


@pytest.mark.parametrize("form", ["ours", "published", "safetensors", "deepspeed", "diffusers"])
def test_no_format_is_written_with_infinity_unasked(tmp_path, form):
    state = state_of("promoe_tc")

    def read(kind: str, name: str) -> torch.Tensor:
        tensor = state.read(kind, name).clone()
        if (kind, name) == ("ema", "blocks.3.mlp.experts.fc1.weight"):
            tensor[2, 0, 0] = -torch.inf
        return tensor

    names = {"published": "a.pth", "safetensors": "a.safetensors"}
    with pytest.raises(ConversionError, match=r"ema of blocks.3.mlp.experts.fc1.weight holds NaN or infinity"):
        export(replace(state, read=read), tmp_path / names.get(form, "folder"), form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["promoe_tc", "diffmoe"])
def test_experts_in_the_files_of_training_are_read_to_the_bit(tmp_path, case):
    """DiffMoE's training saves as DiT's does; its thresholds lie between parameters, and no optimizer has them."""
    state = state_of(case)
    export(state, tmp_path / "release.pth", "published")
    tree = torch.load(tmp_path / "release.pth", weights_only=True)
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in tree["model_state_dict"].items()},
        "ema": tree["ema_model_state_dict"],
        "opt": tree["optimizer_state_dict"],
        "args": argparse.Namespace(config="config/000.yaml"),
    }
    torch.save(content, tmp_path / "a.pt")
    back = open_state(tmp_path / "a.pt", config=state.config)
    assert back.step == back.updates == 10 and any("training objective" in note for note in back.notes)
    for kind in KINDS:
        for name in state.shapes:
            assert torch.equal(back.read(kind, name), state.read(kind, name)), (kind, name)
    assert back.buffers.keys() == state.buffers.keys()
    assert all(torch.equal(back.buffers[name], state.buffers[name]) for name in state.buffers)


def moe_zero_folder(folder: Path, state: State, ranks: int, expert_ranks: int) -> Path:
    """ZeRO-1 in bfloat16 with deepspeed.moe's layers: experts in a group of parameters of their own."""
    tag = folder / "global_step12"
    tag.mkdir()
    (folder / "latest").write_text(tag.name)
    names = deepspeed_names(state.shapes, state.config.model)

    def tensor(kind: str, ours: str, row: int | None) -> torch.Tensor:
        return state.read(kind, ours) if row is None else state.read(kind, ours)[row]

    groups = [[n for n in names if n[2] is None], [n for n in names if n[2] is not None]]
    module = {theirs: tensor("master", ours, row).bfloat16() for theirs, ours, row in groups[0]}
    shapes = [{theirs: tensor("master", ours, row).shape for theirs, ours, row in group} for group in groups]
    torch.save({"module": module, "param_shapes": shapes, "global_steps": 12}, tag / "mp_rank_00_model_states.pt")
    for layer, block in enumerate(state.config.model.moe_blocks):
        for expert in range(state.config.model.num_experts):
            inside = {
                t: tensor("master", o, r).bfloat16() for t, o, r in groups[1] if f"blocks.{block}." in t and r == expert
            }
            torch.save(inside, tag / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    flats = [
        {
            kind: torch.cat([tensor(kind, ours, row).flatten() for _, ours, row in group])
            for kind in KINDS
            if kind != "ema"
        }
        for group in groups
    ]
    for rank in range(ranks):
        parts = [{kind: flat.tensor_split(ranks)[rank].clone() for kind, flat in group.items()} for group in flats]
        moments = {g: {"step": torch.tensor(10.0), **{k: part[k] for k in KINDS[2:]}} for g, part in enumerate(parts)}
        settings = [{"moe": False}, {"moe": True, "name": "ep_size_1"}]
        content = {
            "single_partition_of_fp32_groups": [part["master"] for part in parts],
            "base_optimizer_state": {"state": moments, "param_groups": settings},
            "partition_count": [ranks, expert_ranks],
        }
        torch.save({"optimizer_state_dict": content}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_experts_of_zero_are_the_float32_ones(tmp_path):
    state = state_of("promoe_tc")
    back = open_state(moe_zero_folder(tmp_path, state, 3, 3), config=state.config)
    assert back.updates == 10
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for name in state.shapes:
            assert torch.equal(back.read(kind, name), state.read(kind, name)), (kind, name)


def test_experts_of_zero_that_are_split_over_ranks_are_refused(tmp_path):
    state = state_of("promoe_tc")
    with pytest.raises(ConversionError, match="experts are split over ranks"):
        open_state(moe_zero_folder(tmp_path, state, 2, 1), config=state.config)
