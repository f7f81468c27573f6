"""`model.router=conditional`: separate experts for conditional and null images, without routed experts."""

from dataclasses import replace

import pytest
import torch
from support.golden_states import NAMES, random_state
from support.router_cases import D, S, config_of, filled, tokens
from torch.nn import functional as F

from megapromoe.checkpoint.format import KINDS
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError
from megapromoe.diffusion.samplers import Labels, guided
from megapromoe.nn import Mlp
from megapromoe.nn.moe.conditional_mlp import ConditionalMlp
from megapromoe.nn.parallelize import build

CONDITIONAL = "model.router=conditional"


def plain(p: dict[str, torch.Tensor], names: list[str], activation: str, x: torch.Tensor) -> torch.Tensor:
    """The sum of MLPs of one token (D,), by its formula."""
    out = torch.zeros_like(x)
    for name in names:
        h = p[f"{name}.fc1.weight"] @ x + p[f"{name}.fc1.bias"]
        if activation == "swiglu":
            gate, up = h.chunk(2)
            h = gate * gate.sigmoid() * up
        else:
            h = F.gelu(h, approximate="tanh")
        out = out + p[f"{name}.fc2.weight"] @ h + p[f"{name}.fc2.bias"]
    return out


@pytest.mark.parametrize("num_conditional", [0, 2, 3])
@pytest.mark.parametrize(
    "change, shared, unconditional",
    [
        ({}, ["shared"], ["unconditional"]),
        ({"shared_expert": False, "activation": "swiglu"}, [], ["unconditional"]),
        (
            {"num_shared_experts": 2, "num_unconditional_experts": 2, "shared_expert_width": 7, "expert_width": 12},
            ["shared.0", "shared.1"],
            ["unconditional.0", "unconditional.1"],
        ),
    ],
    ids=["one of each", "no shared expert, SwiGLU", "several"],
)
def test_outputs_and_gradients_of_the_plain_formula(change, shared, unconditional, num_conditional):
    """shared(x) + conditional(x), or shared(x) + unconditional(x) for null images, token by token."""
    config = config_of(router="conditional", **change)
    layer, x = filled(ConditionalMlp(config)).double(), tokens(3).double().requires_grad_()
    weights = torch.randn(3, S, D, generator=torch.Generator().manual_seed(5)).double()
    y = layer(x, num_conditional)
    (y * weights).sum().backward()

    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}
    plain_x = x.detach().clone().requires_grad_()
    names = [shared + (["conditional"] if b < num_conditional else unconditional) for b in range(3)]
    rows = [torch.stack([plain(p, names[b], config.activation, plain_x[b, s]) for s in range(S)]) for b in range(3)]
    expected = torch.stack(rows)
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, plain_x.grad)
    for name, parameter in layer.named_parameters():
        wanted = p[name].grad if p[name].grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_equal_weights_for_both_kinds_of_images_are_a_dense_mlp():
    """Of the summed width, as DiT's: half of it is the shared expert, half the conditional one."""
    layer = filled(ConditionalMlp(config_of(router="conditional", expert_ratio=2.0)))
    layer.unconditional.load_state_dict(layer.conditional.state_dict())
    dense, parts = Mlp(D, 4 * D), (layer.shared, layer.conditional)
    with torch.no_grad():
        dense.fc1.weight.copy_(torch.cat([part.fc1.weight for part in parts]))
        dense.fc1.bias.copy_(torch.cat([part.fc1.bias for part in parts]))
        dense.fc2.weight.copy_(torch.cat([part.fc2.weight for part in parts], dim=1))
        dense.fc2.bias.copy_(parts[0].fc2.bias + parts[1].fc2.bias)
    torch.testing.assert_close(layer(tokens(3), 1), dense(tokens(3)), rtol=1e-4, atol=1e-5)


def test_guidance_takes_its_null_half_from_the_unconditional_expert():
    config = resolve("digits", overrides=[CONDITIONAL])
    model = build(config).eval()
    filled(model)
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 7])
    null = torch.full_like(labels, config.model.null_class)

    def halves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            times = torch.full((2,), 600.0)
            conditional, of_null = model(x, times, labels, 2)[0], model(x, times, null, 0)[0]
            both = guided(model, Labels(labels, config.model.null_class), 2.5)(x, 600.0)
            expected = (of_null + 2.5 * (conditional - of_null))[:, :1]
            assert float((both[:, :1] - expected).norm()) < 1e-4 * float(expected.norm())
            return conditional, of_null, both

    conditional, of_null, both = halves()
    with torch.no_grad():
        for block in config.model.conditional_blocks:
            model.blocks[block].mlp.unconditional.fc2.weight.add_(0.1)
    after = halves()
    assert torch.equal(after[0], conditional)
    assert not torch.allclose(after[1], of_null) and not torch.allclose(after[2], both)


@pytest.mark.parametrize("form", ["ours", "safetensors", "deepspeed", "diffusers"])
def test_every_format_restores_it(tmp_path, form):
    state = random_state(resolve("digits", overrides=[CONDITIONAL, "model.depth=2"]))
    kinds = ("ema",) if form == "diffusers" else KINDS
    export(state, tmp_path / NAMES[form], form, *kinds[:1] * (form == "diffusers"))
    back = open_state(tmp_path / NAMES[form])
    assert back.config.model == state.config.model and back.shapes.keys() == state.shapes.keys()
    assert any(".mlp.conditional." in name for name in state.shapes)
    for kind in kinds:
        assert all(torch.equal(back.read(kind, name), state.read(kind, name)) for name in state.shapes)


def test_the_published_format_has_no_such_model(tmp_path):
    state = random_state(resolve("digits", overrides=[CONDITIONAL, "model.depth=2"]))
    with pytest.raises(ConversionError, match="does not support model.router = conditional"):
        export(state, tmp_path / "a.pth", "published")


@pytest.mark.parametrize(
    "override, rule",
    [
        ("model.unconditional_expert=false", "must be true with model.router = 'conditional'.*set router=dense"),
        ("parallel.ep=2", "parallel.ep = 2: must be 1 with .*no routed experts"),
        ("parallel.recompute=moe", "must be none, blocks or all with .*no routed experts"),
        ("model.capacity_factor=1.5", "must be 0 with model.router = 'conditional'"),
        ("model.moe_every=9", "must be at most model.depth = 4"),
    ],
)
def test_options_without_a_meaning_are_refused(override, rule):
    with pytest.raises(ConfigError, match=rule):
        resolve("digits", overrides=[CONDITIONAL, override], world=2)
    resolve("digits", overrides=[CONDITIONAL, "model.top_k=9"], world=2)  # as the dense model, which ignores it


def test_widths_that_tensor_parallelism_divides():
    for width in ("expert_width=33", "shared_expert_width=33"):
        with pytest.raises(ConfigError, match=f"must divide model.{width.replace('=', ' = ')}"):
            resolve("digits", overrides=[CONDITIONAL, f"model.{width}", "parallel.tp=2"], world=2)
    small = replace(resolve("digits", overrides=[CONDITIONAL]).model, expert_width=34)
    assert small.moe_blocks == () and small.conditional_blocks == (1, 3)
