"""Files as other projects write them, read to the bit or refused with the reason; docs/convert.md has this table."""

import argparse
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.foreign_layouts import (
    KINDS,
    LAYOUTS,
    SIT,
    UPDATES,
    config,
    optimizer,
    saved,
    tensors,
    training,
    weights,
    zero,
)
from support.golden_states import state_of

from megapromoe.cli import main
from megapromoe.config.options import Config, to_dict
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.conversion.conventions import with_objective
from megapromoe.conversion.exports import export
from megapromoe.conversion.foreign import deepspeed_names
from megapromoe.conversion.formats import list_tensors, open_state
from megapromoe.conversion.state import State, config_from
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.conversion.training_arguments import config_of
from megapromoe.conversion.upcycle import _whole_model
from megapromoe.errors import UserError

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


def test_nan_is_refused_with_the_name_and_an_option_goes_on(tmp_path, capsys):
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
    assert back.step == back.updates == 10 and any("trained to predict" in note for note in back.notes)
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


# ---- what it predicts


def velocity(state: State, sigma_B: torch.Tensor) -> torch.Tensor:
    """What our objective takes for the velocity: the first C channels, at noise levels."""
    model = state.config.model
    x_BCHW = torch.randn(
        len(sigma_B), model.in_channels, *(model.input_size,) * 2, generator=torch.Generator().manual_seed(2)
    )
    out_BCHW, _ = _whole_model(state, "master")(x_BCHW, 1000 * sigma_B, torch.arange(len(sigma_B)), len(sigma_B))
    return out_BCHW[:, : model.in_channels]


def test_a_model_of_sit_computes_its_own_velocity_in_our_time(tmp_path):
    sigma_B = torch.tensor([0.05, 0.4, 0.8, 0.97])
    path = saved(lambda: training(**SIT))(tmp_path)
    ours = velocity(open_state(path, config=config()), sigma_B)
    # SiT's model as it is: its time is 1 at the data, and is embedded as it is; it predicts clean - noise.
    plain = replace(open_state(saved(lambda: training(config="a"), "b.pth")(tmp_path), config=config()))
    theirs = velocity(plain, (1 - sigma_B) / 1000)
    torch.testing.assert_close(ours, -theirs, rtol=1e-5, atol=1e-6)


def test_a_model_of_repa_computes_its_own_velocity_in_our_time(tmp_path):
    sigma_B = torch.tensor([0.05, 0.4, 0.8, 0.97])
    path = saved(weights)(tmp_path)
    ours = velocity(open_state(path, config=config(), objective="repa"), sigma_B)
    torch.testing.assert_close(ours, velocity(open_state(path, config=config()), sigma_B / 1000), rtol=1e-5, atol=1e-6)


def test_a_converted_sit_goes_back_with_its_own_sign(tmp_path):
    state = open_state(saved(lambda: training(**SIT))(tmp_path), config=config())
    export(state, tmp_path / "b.pth", "published")
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(torch.equal(back["model_state_dict"][name], tensor) for name, tensor in tensors()["master"].items())
    again = open_state(tmp_path / "b.pth", config=state.config)
    for kind in KINDS:
        for name in state.shapes:
            assert torch.equal(again.read(kind, name), state.read(kind, name)), (kind, name)


def test_the_objective_is_asked_once_and_not_against_what_is_told(tmp_path):
    told, bare = saved(lambda: training(**SIT))(tmp_path), saved(weights, "bare.pth")(tmp_path)
    with pytest.raises(ConversionError, match="--objective ddpm, but its args are of a model of sit"):
        open_state(told, config=config(), objective="ddpm")
    state = open_state(bare, config=config(), objective="ddpm")
    assert state.config.diffusion.objective == "ddpm" and state.config.sample.method == "ddpm"
    assert not any("trained to predict" in note for note in state.notes)
    export(state, tmp_path / "run", "ours")
    with pytest.raises(ConversionError, match="says itself what it was trained for"):
        open_state(tmp_path / "run", objective="rf")
    mine = with_objective(resolve("digits", overrides=["diffusion.time=mode"]), "rf")
    assert mine.diffusion.time == "mode"  # nothing to change


@pytest.mark.parametrize(
    "arguments, model, objective",
    [
        ({"model": "DiT-XL/2", "image_size": 256}, ("dit", 1152, 28, 2, 32, True), "ddpm"),
        ({"model": "DiT-B/4", "image_size": 512, "num_classes": 10}, ("dit", 768, 12, 4, 64, True), "ddpm"),
        ({**SIT, "model": "SiT-L/2", "image_size": 256}, ("sit", 1024, 24, 2, 32, True), "rf"),
        (
            {"model": "SiT-XL/2", "resolution": 256, "path_type": "linear", "prediction": "v", "proj_coeff": 0.5},
            ("repa", 1152, 28, 2, 32, False),
            "rf",
        ),
    ],
)
def test_arguments_of_training_tell_the_model(arguments, model, objective):
    made = config_of(Path("a.pt"), arguments)
    m = made.model
    assert (m.time_input, m.hidden_size, m.depth, m.patch_size, m.input_size, m.learn_sigma) == model
    assert made.diffusion.objective == objective and m.num_classes == arguments.get("num_classes", 1000)


@pytest.mark.parametrize(
    "arguments", [{}, {"model": "DiT-XL/2"}, {"model": "DiT-Z/2", "image_size": 256}, {"model": 3}]
)
def test_arguments_that_do_not_tell_the_model_leave_it_open(arguments):
    assert config_of(Path("a.pt"), arguments) is None


def test_a_namespace_is_read_and_none_of_its_code_is_run(tmp_path):
    class Loud(argparse.Namespace):
        def __setstate__(self, state):
            raise AssertionError("it was run")

    Loud.__module__, Loud.__qualname__, Loud.__name__ = "argparse", "Namespace", "Namespace"
    original, argparse.Namespace = argparse.Namespace, Loud
    try:
        torch.save({"args": Loud(lr=1, path=Path("/data")), "x": torch.ones(2)}, tmp_path / "a.pt")
        assert read_pickle(tmp_path / "a.pt")["args"]["lr"] == 1
    finally:
        argparse.Namespace = original
    assert list(list_tensors(tmp_path / "a.pt")[1]) == ["x"]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda o: o["param_groups"][0].update(params=[0] * len(o["param_groups"][0]["params"])), "stands twice"),
        (lambda o: o.pop("state"), "has no param_groups, or no state"),
        (lambda o: o.update(param_groups=3), "no list of mappings"),
        (lambda o: o.update(state={1: 3}), "no mapping of mappings"),
        (lambda o: o["state"][2].update(step=float("nan")), "step of x_embedder.proj.bias is no whole number"),
        (
            lambda o: o["state"][2].update(exp_avg=torch.zeros(32, dtype=torch.int8)),
            "the exp_avg of x_embedder.proj.bias",
        ),
    ],
    ids=range(6),
)
def test_a_malformed_optimizer_is_a_sentence(tmp_path, change, named):
    state = optimizer()
    change(state)
    with pytest.raises(ConversionError, match=named):
        open_state(saved(lambda: training(lambda: state))(tmp_path), config=config())


def test_an_optimizer_that_names_some_parameters_leaves_the_others_at_zero(tmp_path):
    state = optimizer(param_names=["x_embedder.proj.weight"])
    state["param_groups"][0]["params"] = [1]
    opened = open_state(saved(lambda: training(lambda: state))(tmp_path), config=config())
    assert torch.equal(opened.read("exp_avg", "x_embedder.proj.weight"), tensors()["exp_avg"]["x_embedder.proj.weight"])
    assert not opened.read("exp_avg", "final_layer.linear.weight").any()
    assert any("no moments of" in note for note in opened.notes)


JUNK = [None, 3, -1, 1.5, "x", [], {}, True, float("nan"), torch.zeros(3), torch.zeros(()), [torch.zeros(2)], {"a": 1}]


def spoilt(tree, generator: random.Random):
    """The tree with one value of it, at any depth, replaced by junk; or removed, or its key renamed."""
    if not isinstance(tree, (dict, list)) or not tree or generator.random() < 0.1:
        return generator.choice(JUNK)
    if isinstance(tree, list):
        at = generator.randrange(len(tree))
        return [spoilt(value, generator) if i == at else value for i, value in enumerate(tree)]
    at = generator.choice(list(tree))
    how = generator.random()
    out = {key: spoilt(value, generator) if key == at and how > 0.2 else value for key, value in tree.items()}
    if how <= 0.2:
        value = out.pop(at)
        if how < 0.1:
            out[generator.choice(["x", 3, None, "model"])] = value
    return out


@pytest.mark.full
@pytest.mark.parametrize("of", ["training", "lightning", "zero"])
def test_whatever_is_spoilt_in_a_file_is_a_sentence_or_does_not_matter(tmp_path, of):
    generator = random.Random(0)
    path = zero()(tmp_path) if of == "zero" else tmp_path / "a.pth"
    files = {file: torch.load(file, weights_only=True) for file in sorted(tmp_path.rglob("*.pt"))}
    sources = list(files) or [path]
    content = {"state_dict": weights(), "optimizer_states": [optimizer()], "global_step": 7}
    refused = 0
    for _ in range(40):
        file = generator.choice(sources)
        good = files.get(file) or (training() | {"args": {**SIT}} if of == "training" else content)
        torch.save(spoilt(good, generator), file)
        try:
            state = open_state(path, config=config())
            for kind in state.kinds:
                for name in state.shapes:
                    state.read(kind, name)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 2000
        if files:
            torch.save(good, file)
    assert refused > 10
