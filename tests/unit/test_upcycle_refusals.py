"""Upcycling from models, tokens and noise that are not finite: a sentence each, and nothing is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.state import State, model_shapes
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.upcycle import check_fit, cluster

SMALL = ["model.hidden_size=32", "model.depth=2", "model.heads=2", "model.num_experts=4"]


def state_of(*settings: str, scale: float = 0.1) -> State:
    config = resolve("digits", overrides=[*SMALL, *settings])
    shapes, _ = model_shapes(config.model)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    kinds = ("master", "ema")
    return State(Path("made"), "made", config, 7, 7, kinds, shapes, {}, lambda kind, name: tensors[name].clone())


def with_value(state: State, name: str, value: float) -> State:
    def read(kind: str, parameter: str) -> torch.Tensor:
        tensor = state.read(kind, parameter)
        if parameter == name:
            tensor.view(-1)[0] = value
        return tensor

    return replace(state, read=read)


@pytest.mark.parametrize("option", ["--noise", "--spread"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_noise_that_is_not_finite_is_refused(tmp_path, capsys, option, value):
    assert main(["upcycle", str(tmp_path / "a"), str(tmp_path / "b"), option, value]) == 2
    assert f"{option} {float(value)}: must be a finite number, 0 or more" in capsys.readouterr().err


def test_noise_beyond_float32_gives_no_infinite_experts(tmp_path, capsys):
    export(state_of(), tmp_path / "small", "ours")
    command = ["upcycle", str(tmp_path / "small"), str(tmp_path / "big"), "model.num_experts=8", "--noise", "1e39"]
    assert main(command) == 1
    assert "made from it, holds NaN or infinity; use less noise or spread" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("router", ["dense", "promoe"])
def test_a_source_that_is_not_finite_is_refused_by_its_tensors_name(tmp_path, capsys, router, value):
    source = with_value(state_of(f"model.router={router}"), "blocks.0.attn.qkv.weight", value)
    export(source, tmp_path / "source", "ours", allow_nonfinite=True)
    command = [str(tmp_path / "source"), str(tmp_path / "made"), f"model.num_experts={8 if router == 'promoe' else 4}"]
    assert main(["upcycle", *command, "--num-images", "8"]) == 1
    assert "of blocks.0.attn.qkv.weight holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_tokens_that_are_not_finite_are_refused_before_k_means():
    tokens = torch.randn(16, 32)
    tokens[3, 4] = torch.inf
    with pytest.raises(ConversionError, match="tokens of the source hold NaN or infinity"):
        cluster(tokens, resolve("digits", overrides=SMALL))


def test_the_time_input_of_the_source_must_be_kept():
    dense = state_of("model.router=dense", "model.time_input=sit")
    other = resolve("digits", overrides=[*SMALL, "model.router=promoe"])
    with pytest.raises(ConversionError, match="model.time_input = dit: must be the source's sit"):
        check_fit(dense, other, "slice")


def test_a_dense_model_of_sit_becomes_a_promoe_of_its_time(tmp_path):
    dense = state_of("model.router=dense", "model.time_input=sit")
    export(dense, tmp_path / "dense", "ours")
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "made"), "--num-images", "8"]) == 0
    assert open_state(tmp_path / "made").config.model.time_input == "sit"
    manifest = next((tmp_path / "made").rglob("manifest.json"))
    assert json.loads(manifest.read_text())["config"]["model"]["time_input"] == "sit"
