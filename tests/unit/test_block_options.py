"""Options of a block: SwiGLU, RMSNorm, normalised queries and keys, rotary positions, shared modulation."""

from dataclasses import fields, replace

import pytest
import torch
from support.backends import BACKENDS
from support.levels import full
from support.plain_dit import plain_dit
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.nn import Mlp
from megapromoe.nn.activations import swiglu
from megapromoe.nn.dit import DiT
from megapromoe.nn.norms import rms_norm
from megapromoe.nn.rotary import image_angles, rotate, rotation_of

SMALL = ModelConfig(
    hidden_size=24,
    depth=2,
    heads=3,
    input_size=6,
    num_classes=3,
    num_experts=4,
    rcl_weight=0.0,
    score_function="sigmoid",
)
ALL = {"activation": "swiglu", "norm": "rms", "qk_norm": "rms", "positions": "rope", "modulation": "shared"}
LABELS = [2, 0, SMALL.null_class]
NUM_CONDITIONAL = 2


def stirred(config: ModelConfig) -> DiT:
    """A model in float64 of which no parameter is zero."""
    torch.manual_seed(0)
    model = DiT(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data + 0.2 * noise
    return model


@pytest.mark.parametrize(
    "change",
    [
        {},
        ALL,
        *(full({name: value}) for name, value in ALL.items()),
        full({"qk_norm": "layer", "positions": "rope"}),
        full({"router": "dense", **ALL}),
        full({"top_k": 2, "num_shared_experts": 2, "num_unconditional_experts": 2, "expert_width": 20, **ALL}),
        full({"shared_expert": False, "unconditional_expert": False, "activation": "swiglu"}),
        {"router_input": "unmodulated", "top_k": 2},
        full({"router_input": "unmodulated", "shared_expert": False, **ALL}),
        full({"router": "conditional", **ALL}),
    ],
    ids=lambda change: " ".join(f"{name}={value}" for name, value in change.items()) or "defaults",
)
def test_outputs_and_gradients_of_the_plain_reference(change):
    config = replace(SMALL, **change)
    model = stirred(config)
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64)
    t_B = torch.tensor([1.0, 8.0, 40.0])  # small: the angles of the time embedding are float32
    weights = torch.randn(3, config.out_channels, 6, 6, generator=generator, dtype=torch.float64)
    prediction, _ = model(x_BCHW, t_B, torch.tensor(LABELS), NUM_CONDITIONAL)
    (prediction * weights).sum().backward()
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain_dit(plain, config, x_BCHW, t_B, LABELS, NUM_CONDITIONAL)
    (expected * weights).sum().backward()
    torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    for name, parameter in model.named_parameters():
        wanted = plain[name].grad if plain[name].grad is not None else torch.zeros_like(plain[name])
        assert float((parameter.grad - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-8, name


def test_grouped_and_looped_experts_are_one():
    outputs = []
    for backend in BACKENDS.values():
        model = stirred(replace(SMALL, **ALL)).float()
        with backend():
            prediction, _ = model(torch.ones(3, 4, 6, 6), torch.ones(3), torch.tensor(LABELS), NUM_CONDITIONAL)
            prediction.square().sum().backward()
        outputs.append([prediction, *(p.grad for p in model.parameters())])
    for looped, grouped in zip(*outputs, strict=True):
        torch.testing.assert_close(looped, grouped, rtol=1e-4, atol=1e-5 * float(looped.detach().abs().max()))


def test_the_defaults_are_those_of_the_published_models():
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    published = {"activation": "gelu", "norm": "layer", "qk_norm": "none", "positions": "sincos", "modulation": "block"}
    published |= {"router_input": "modulated"}
    assert {name: defaults[name] for name in published} == published


@pytest.mark.parametrize("option, value", [*ALL.items(), ("router_input", "unmodulated")])
def test_every_option_changes_the_model(option, value):
    """That is, none is ignored: with equal parameters, where there are such, the outputs differ."""
    plain, changed = stirred(SMALL), stirred(replace(SMALL, **{option: value}))
    same = {n: p for n, p in plain.named_parameters() if n in dict(changed.named_parameters())}
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name in same and same[name].shape == parameter.shape:
                parameter.copy_(same[name])
    x, t, y = torch.ones(3, 4, 6, 6).double(), torch.full((3,), 300.0), torch.tensor(LABELS)
    outputs = [model(x, t, y, NUM_CONDITIONAL)[0] for model in (plain, changed)]
    assert float(((outputs[0] - outputs[1]).norm() / outputs[0].norm()).detach()) > 1e-3


# ---- SwiGLU


def test_gradients_of_swiglu_and_rms_norm():
    x = torch.randn(3, 8, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-3), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_rms_norm_as_torch_computes_them(dtype):
    x, weight = torch.randn(5, 4, 16).to(dtype), torch.randn(16).to(dtype)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(swiglu(strided), F.silu(strided[..., :8]) * strided[..., 8:])
    torch.testing.assert_close(rms_norm(strided, weight, 1e-6), F.rms_norm(strided, (16,), weight, 1e-6))
    assert swiglu(x[:0]).shape == (0, 4, 8) and rms_norm(x[:0], None, 1e-6).shape == (0, 4, 16)


def test_the_projections_of_a_swiglu_start_as_two_matrices():
    torch.manual_seed(0)
    gate, up = Mlp(64, 256, "swiglu").fc1.weight.chunk(2)
    for matrix in (gate, up):
        assert float(matrix.detach().abs().max()) == pytest.approx((6 / (64 + 256)) ** 0.5, rel=1e-3)
    assert not torch.equal(gate, up)


# ---- rotary positions


def test_scores_depend_on_the_distance_only():
    """The score of a query and a key is the same at all places of an image with the same offset."""
    side, width = 5, 16
    q, k = torch.randn(2, width, dtype=torch.float64)
    rotation = rotation_of(image_angles(side, width, torch.device("cpu")))
    every = side * side
    queries, keys = (rotate(v.expand(1, 1, every, width), rotation)[0, 0].view(side, side, width) for v in (q, k))
    scores = {}
    for row, column in ((1, 1), (2, 3), (3, 2)):
        for down, right in ((0, 0), (1, 0), (0, 1), (-1, 1)):
            score = float(queries[row, column] @ keys[row + down, column + right])
            scores.setdefault((down, right), []).append(score)
    for values in scores.values():
        assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    distinct = [values[0] for values in scores.values()]
    assert len({round(value, 4) for value in distinct}) == 4, "rows and columns count separately"


def test_rotations_keep_lengths_and_the_dtype():
    x = torch.randn(2, 3, 9, 8).bfloat16()
    turned = rotate(x, rotation_of(image_angles(3, 8, x.device)))
    assert turned.dtype == torch.bfloat16 and torch.equal(turned[:, :, 0], x[:, :, 0]), "the first token is at 0, 0"
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_scaled_positions_of_a_finer_grid_span_those_of_the_coarse_one(positions):
    """Every second row and column of twice the side is at the place of one row and column of the coarse grid."""

    def table(side: int, scale: float) -> torch.Tensor:
        if positions == "rope":
            return image_angles(side, 16, torch.device("cpu"), scale).view(side, side, -1)
        config = resolve("digits", overrides=[f"model.input_size={2 * side}", f"model.position_scale={scale}",
                                              "data.source=synthetic"])  # fmt: skip
        return DiT(config.model).pos_embed.view(side, side, -1)

    torch.testing.assert_close(table(8, 0.5)[::2, ::2], table(4, 1.0), rtol=1e-6, atol=1e-6)
    assert not torch.equal(table(4, 0.5), table(4, 1.0))


def test_heads_that_cannot_be_rotated_are_refused():
    rule = r"model.heads = 16: must divide .* 96 into heads of a multiple of 4 channels with rope; nearest: 8, 12, 24"
    with pytest.raises(ConfigError, match=rule):
        resolve("fashion", overrides=["model.positions=rope", "model.heads=16"])
    with pytest.raises(ConfigError, match="none does, choose another model.hidden_size"):
        resolve("fashion", overrides=["model.positions=rope", "model.heads=1", "model.hidden_size=90"])
    resolve("fashion", overrides=["model.positions=rope", "model.heads=12"])
