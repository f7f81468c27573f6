"""diffusers' own DiT: read from its folders, whole, sharded or in half precision; it computes the same."""

import json
from dataclasses import replace

import pytest
import torch

from megapromoe.config.resolve import resolve
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.upcycle import _load_model

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install megapromoe[images]")

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "num_layers": 2}
SIZES |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}


@pytest.fixture(scope="module")
def model():
    """A small model whose every tensor matters; blocks share their embeddings, as in trained ones."""
    made = diffusers.DiTTransformer2DModel(**SIZES, out_channels=6).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for block in made.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(made.transformer_blocks[0].norm1.emb.state_dict())
    return made


def outputs(state, model, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and diffusers', of the same images; class 10 is the null class."""
    x_BCHW = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t_B, y_B = torch.tensor([0, 1, 77, 500, 998, 999]), torch.tensor([0, 3, 5, 9, 10, 10])
    with torch.no_grad():
        theirs = model(x_BCHW.to(dtype), t_B, y_B).sample
    return _load_model(state, "master")(x_BCHW, t_B.float(), y_B, 4)[0], theirs


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("shards", ["10GB", "30KB"])
def test_it_computes_what_diffusers_computes(tmp_path, model, shards):
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (shards == "30KB")
    state = open_state(tmp_path)
    assert state.format == "diffusers" and state.config.diffusion.objective == "ddpm"
    ours, theirs = outputs(state, model)
    assert error(ours, theirs) < 1e-5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_its_time_frequencies_and_its_epsilon_are_not_those_of_dit(tmp_path, model):
    """Both settings matter, so that the test above would see either missing."""
    model.save_pretrained(tmp_path)
    state = open_state(tmp_path)
    for setting in ({"time_frequency_shift": 0}, {"mlp_norm_eps": 1e-2}):
        config = replace(state.config, model=replace(state.config.model, **setting))
        other = open_state(tmp_path, config=config)
        assert any("is used" in note for note in other.notes)
        assert error(*outputs(other, model)) > 1e-4, setting


def test_half_precision_is_widened(tmp_path, model):
    half = diffusers.DiTTransformer2DModel(**SIZES, out_channels=6).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    state = open_state(tmp_path)
    assert any("are float16: widened" in note for note in state.notes)
    weight = model.proj_out_2.weight.half().float()
    assert torch.equal(state.read("ema", "final_layer.linear.weight"), weight)


def test_a_config_of_another_model_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="model.router = dense, but the given config has promoe"):
        open_state(tmp_path, config=resolve("digits"))
    described = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("num_layers", 3), ("num_layers", 10**9), ("patch_size", "2"), ("out_channels", 5)):
        (tmp_path / "config.json").write_text(json.dumps(described | {key: value}))
        with pytest.raises(ConversionError, match="another model|config.json has"):
            open_state(tmp_path)


@pytest.mark.parametrize("setting", ["norm=rms", "activation=swiglu", "qk_norm=layer", "modulation=shared"])
def test_a_config_with_other_blocks_is_refused(tmp_path, model, setting):
    model.save_pretrained(tmp_path)
    described = open_state(tmp_path).config.model
    option, _, value = setting.partition("=")
    config = replace(open_state(tmp_path).config, model=replace(described, **{option: value}))
    with pytest.raises(ConversionError, match=f"with model.{option} = .*, but the given config has {value}"):
        open_state(tmp_path, config=config)


def test_a_model_without_variance_needs_the_objective_option(tmp_path):
    diffusers.DiTTransformer2DModel(**SIZES | {"num_layers": 1}, out_channels=3).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="--objective"):
        open_state(tmp_path)
    state = open_state(tmp_path, objective="rf")
    assert not state.config.model.learn_sigma and state.config.diffusion.objective == "rf"
