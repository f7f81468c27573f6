"""Files of training scripts: what they predict, their arguments, their optimizers, and any of it spoilt."""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.foreign_files import KINDS, config, optimizer, saved, tensors, training, weights, zero
from support.foreign_layouts import SIT

from megapromoe.config.resolve import resolve
from megapromoe.conversion.conventions import with_objective
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import list_tensors, open_state
from megapromoe.conversion.state import State
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.conversion.training_arguments import config_of
from megapromoe.conversion.upcycle import _load_model
from megapromoe.errors import UserError


def velocity(state: State, sigma_B: torch.Tensor) -> torch.Tensor:
    """What our objective takes for the velocity: the first C channels, at noise levels."""
    model = state.config.model
    x_BCHW = torch.randn(
        len(sigma_B), model.in_channels, *(model.input_size,) * 2, generator=torch.Generator().manual_seed(2)
    )
    out_BCHW, _ = _load_model(state, "master")(x_BCHW, 1000 * sigma_B, torch.arange(len(sigma_B)), len(sigma_B))
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


def test_a_given_objective_must_not_contradict_the_file(tmp_path):
    with_arguments, bare = saved(lambda: training(**SIT))(tmp_path), saved(weights, "bare.pth")(tmp_path)
    with pytest.raises(ConversionError, match="--objective ddpm, but the args in the file are those of sit"):
        open_state(with_arguments, config=config(), objective="ddpm")
    state = open_state(bare, config=config(), objective="ddpm")
    assert state.config.diffusion.objective == "ddpm" and state.config.sample.method == "ddpm"
    assert not any("training objective" in note for note in state.notes)
    export(state, tmp_path / "run", "ours")
    with pytest.raises(ConversionError, match="contains its objective"):
        open_state(tmp_path / "run", objective="rf")
    own_config = with_objective(resolve("digits", overrides=["diffusion.time=mode"]), "rf")
    assert own_config.diffusion.time == "mode"  # nothing to change


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
def test_the_model_is_read_from_the_training_arguments(arguments, model, objective):
    made = config_of(Path("a.pt"), arguments)
    m = made.model
    assert (m.time_input, m.hidden_size, m.depth, m.patch_size, m.input_size, m.learn_sigma) == model
    assert made.diffusion.objective == objective and m.num_classes == arguments.get("num_classes", 1000)


@pytest.mark.parametrize(
    "arguments", [{}, {"model": "DiT-XL/2"}, {"model": "DiT-Z/2", "image_size": 256}, {"model": 3}]
)
def test_arguments_without_a_known_model_give_no_config(arguments):
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
        (lambda o: o["param_groups"][0].update(params=[0] * len(o["param_groups"][0]["params"])), "listed twice"),
        (lambda o: o.pop("state"), "has no param_groups, or no state"),
        (lambda o: o.update(param_groups=3), "not a list of mappings"),
        (lambda o: o.update(state={1: 3}), "not a mapping of mappings"),
        (lambda o: o["state"][2].update(step=float("nan")), "step of x_embedder.proj.bias is not a whole number"),
        (
            lambda o: o["state"][2].update(exp_avg=torch.zeros(32, dtype=torch.int8)),
            "the exp_avg of x_embedder.proj.bias",
        ),
    ],
    ids=range(6),
)
def test_a_malformed_optimizer_is_a_user_error(tmp_path, change, named):
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
    assert any("have no moments" in note for note in opened.notes)


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
