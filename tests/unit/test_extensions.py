"""Routers and samplers of users, in files and entry points: what is recorded, refused, counted and logged."""

import copy
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.trajectory import small

from megapromoe.checkpoint.origin import changed_settings, fixed_changes
from megapromoe.config.extensions import ROUTER, ExtensionError, shown
from megapromoe.config.options import ConfigError, to_dict
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.diffusion.samplers import sample
from megapromoe.nn import MoE, auxiliary_loss
from megapromoe.nn.parallelize import build, layouts
from megapromoe.planning import cost
from megapromoe.run_lines import is_auxiliary_loss, logged_loss

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_router.py"
BIASED = f"model.router={EXAMPLE}:BiasedRouter"

FOREIGN = """
import torch
from torch import nn
from megapromoe.nn import ROUTERS, ParameterRule, Router, token_choice, top_k, zeros
from megapromoe.planning.cost import Linear

class Deep(Router):
    \"\"\"Two linear layers of torch's own, and a parameter with a rule.\"\"\"
    rules = {"temperature": ParameterRule(zeros)}

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.SiLU(), nn.Linear(8, config.num_experts))
        self.temperature = nn.Parameter(torch.zeros(()))

    @classmethod
    def planned_layers(cls, config):
        return [
            Linear("router", config.hidden_size, 8, 1, config.tokens),
            Linear("router", 8, config.num_experts, 1, config.tokens),
            Linear("router", 1, 1, 1, 0, bias=False),
        ]

    def forward(self, x_BSD, y_B=None, routing_cache=None):
        score = (self.layers(x_BSD.float()) * self.temperature.exp()).softmax(-1)
        chosen = top_k(score.detach(), self.config.top_k)
        return self.output(token_choice(chosen, score.gather(-1, chosen)), {})

class Uncounted(Deep):
    planned_layers = Router.planned_layers

class Sparse(ROUTERS["promoe"]):
    def forward(self, *arguments):
        routed = super().forward(*arguments)
        if not self.training:
            return routed
        return routed._replace(losses={**routed.losses, "weight": 0.1 * routed.assignment.weight_R.square().mean()})

class NoRouter:
    pass
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "router.py"
    path.write_text(FOREIGN)
    return path


# ---- configuration


def test_the_config_records_the_absolute_path_and_the_hash(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    model = small("model.router=router.py:Deep").model
    assert re.fullmatch(rf"{file}:Deep@sha256:[0-9a-f]{{16}}", model.router) and shown(model.router) == "router.py:Deep"
    assert model.has_two_step_router and model.shared_experts == model.unconditional_experts == 1
    file.write_text(FOREIGN + "\n")
    assert small("model.router=router.py:Deep").model.router != model.router


def test_a_saved_config_keeps_what_it_recorded_and_another_router_replaces_it(file, tmp_path):
    config = small(f"model.router={file}:Deep")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    file.write_text(FOREIGN + "\n")
    assert resolve(file=saved) == config, "a run has the version with which it began"
    with pytest.raises(ExtensionError, match=r"has changed: it is sha256:\w+ now; .* name it in model\.router again"):
        build(resolve(file=saved))
    present = resolve(file=saved, overrides=[f"model.router={file}:Deep"])
    build(present)
    changed = changed_settings(to_dict(config), present)
    assert fixed_changes(changed) == ["model.router"], "a run is not continued with it unless --allow names it"
    assert resolve(file=saved, overrides=["model.router=promoe"]).model.router == "promoe"
    file.unlink()
    assert resolve(file=saved) == config, "a run without its file can still be listed"
    with pytest.raises(ExtensionError, match=r"the file cannot be read \(No such file"):
        build(resolve(file=saved))


@pytest.mark.parametrize(
    "router, message",
    [
        ("none.py:Deep", r"the file cannot be read \(No such file or directory\); give .* FILE\.py:NAME"),
        ("router.py", "must be one of dense, promoe"),
        ("promo", "did you mean promoe"),
        ("os:system", "must be one of dense, promoe"),
    ],
)
def test_a_router_that_is_none_is_refused_with_the_configuration(router, message, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match=message):
        small(f"model.router={router}")


def test_files_that_have_no_such_router_are_named(file):
    with pytest.raises(ExtensionError, match=r"the file has no Deeper; it has Deep, Uncounted, Sparse, NoRouter"):
        build(small(f"model.router={file}:Deeper"))
    with pytest.raises(ExtensionError, match=r"must be a subclass of megapromoe\.nn\.Router"):
        build(small(f"model.router={file}:NoRouter"))
    for content, message in (
        ("\n1 / 0\n", r"ZeroDivisionError.*, line 2\)"),
        ("def (", "SyntaxError"),
        ("import no_such", "no_such"),
    ):
        file.write_text(content)
        with pytest.raises(ExtensionError, match=f"cannot be executed .*{message}"):
            ROUTER.load(f"{file}:Deep")


def test_a_file_is_not_searched_for_and_changes_no_path(file, monkeypatch):
    """Neither its folder nor its name can be imported, before and after."""
    monkeypatch.chdir(file.parent.parent)
    path, modules = list(sys.path), set(sys.modules)
    first = ROUTER.load(f"{file}:Deep")
    assert first is ROUTER.load(f"{file}:Deep") and sys.path == path
    assert {name.rpartition("_")[0] for name in set(sys.modules) - modules} == {"megapromoe_extension"}
    with pytest.raises(ConfigError):
        small("model.router=router.py:Deep")


def test_an_entry_point(file, monkeypatch):
    deep = ROUTER.load(f"{file}:Deep")
    point = SimpleNamespace(
        value="package:Deep", dist=SimpleNamespace(name="package", version="1.2"), load=lambda: deep
    )

    def entry_points(group, name):
        return [point] if (group, name) == ("megapromoe.routers", "deep") else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    config = small("model.router=deep")
    assert config.model.router == "deep@package 1.2" and shown(config.model.router) == "deep"
    assert type(build(config).blocks[1].mlp.router) is deep
    point.dist.version = "1.3"
    with pytest.raises(ExtensionError, match=r"'deep@package 1\.2': has changed: it is package 1\.3 now"):
        build(config)


# ---- the model


def test_modules_of_torch_start_as_torch_starts_them_determined_by_the_seed(file):
    def state(*overrides):
        return build(small(f"model.router={file}:Deep", *overrides)).state_dict()

    torch.manual_seed(1)
    first, other = state(), state("train.seed=1")
    torch.manual_seed(2)
    names = [name for name in first if ".router.layers." in name]
    assert len(names) == 8
    for name, value in state().items():
        assert torch.equal(value, first[name])
    for name in names:
        inputs = 32 if ".layers.0." in name else 8
        assert 0.5 / inputs**0.5 < first[name].abs().max() <= 1 / inputs**0.5, "torch's own rule"
        assert not torch.equal(first[name], other[name])


def test_costs_are_those_of_the_built_model(file, caplog):
    for router in (BIASED, f"model.router={file}:Deep"):
        config = small(router)
        model = build(config)
        count = sum(layout_size(shape) for shape in (layout.shape for layout in layouts(model).values()))
        assert cost.parameters(config.model).trainable == count and "planned_layers" not in caplog.text
    build(small(f"model.router={file}:Uncounted"))
    assert "has 301 parameters in a layer, but planned_layers() of the class counts 128" in caplog.text


def layout_size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_in_a_layer_of_somebody_else(file):
    x = torch.randn(3, 9, 16)
    for router in (f"{file}:Deep", ROUTER.load(f"{file}:Deep")):
        torch.manual_seed(0)
        moe = MoE(hidden_size=16, num_experts=4, router=router).train()
        y, auxiliary = copy.deepcopy(moe)(x, 2)
        (y.square().mean() + auxiliary_loss([auxiliary])).backward()
        assert y.isfinite().all() and auxiliary.load_E.sum() == 2 * 9


def test_the_example_balances_its_experts():
    torch.manual_seed(0)
    moe = MoE(hidden_size=16, num_experts=4, router=f"{EXAMPLE}:BiasedRouter").train()
    x = torch.randn(8, 16, 16) + 2 * torch.randn(16)  # tokens that are alike

    def imbalance() -> float:
        load_E = moe(x)[1].load_E
        return float(load_E.max() / load_E.mean())

    first = imbalance()
    for _ in range(150):
        last = imbalance()
    assert first > 2 and last < 1.6
    bias = moe.router.bias.clone()
    moe.eval()(x)
    assert torch.equal(moe.router.bias, bias), "evaluation does not change the state"


# ---- losses


def test_a_loss_is_added_to_a_router_of_ours(file):
    """With the contrastive loss of all layers; it reaches the prototypes, and is part of the loss of the model."""
    config = small(f"model.router={file}:Sparse", "model.rcl_weight=0.5")
    model, ours = build(config).train(), build(small("model.rcl_weight=0.5")).train()
    ours.load_state_dict(model.state_dict())
    arguments = torch.randn(4, 4, 8, 8), torch.ones(4), torch.tensor([1, 2, 3, 10]), 3
    (_, auxiliary), (_, expected) = model(*arguments), ours(*arguments)
    assert auxiliary.losses.keys() == {"rcl", "weight"} and auxiliary.losses["weight"].shape == (2,)
    assert torch.equal(auxiliary.losses["rcl"], expected.losses["rcl"])
    torch.testing.assert_close(auxiliary.total(), expected.total() + auxiliary.losses["weight"].sum())
    auxiliary.losses["weight"].sum().backward()
    assert model.blocks[1].mlp.router.prototypes.grad.any()
    assert model.eval()(*arguments)[1].losses == {}


def test_losses_are_logged_by_their_names():
    assert (logged_loss("rcl"), logged_loss("z")) == ("contrastive_loss", "z_loss")
    assert is_auxiliary_loss("z_loss") and not is_auxiliary_loss("total_loss") and not is_auxiliary_loss("gate")
    for name in ("total", "denoising", "contrastive"):
        with pytest.raises(ValueError, match=f"a router has a loss '{name}', which would be logged as '{name}_loss'"):
            logged_loss(name)


# ---- samplers

SAMPLER_FILE = """
from megapromoe.diffusion.samplers import sample as ours

def two_halves(predict, x_BCHW, steps, shift, noise_at, done):
    return ours(predict, x_BCHW, "euler", steps, shift, progress=done)

def wrong(predict, x_BCHW, steps, shift, noise_at, done):
    return x_BCHW[:1]
"""


def test_a_sampler_of_a_user(tmp_path):
    file = tmp_path / "sampler.py"
    file.write_text(SAMPLER_FILE)
    config = small(f"sample.method={file}:two_halves", "sample.steps=3")
    assert re.fullmatch(rf"{file}:two_halves@sha256:\w+", config.sample.method)
    noise, finished = torch.randn(2, 1, 4, 4), []

    def predict(x, time):
        return x * time / 1000

    images = sample(predict, noise, config.sample.method, 3, progress=finished.append)
    assert torch.equal(images, sample(predict, noise, "euler", 3)) and finished == [1, 2, 3]
    with pytest.raises(ValueError, match=r"returned \(1, 1, 4, 4\), must be images \(2, 1, 4, 4\)"):
        sample(predict, noise, f"{file}:wrong", 3)
    small(f"sample.method={file}:two_halves", "diffusion.objective=ddpm")  # may be for any objective
    file.write_text(SAMPLER_FILE + "\n")
    with pytest.raises(ExtensionError, match=r"sample\.method = .*: has changed: .* name it in sample\.method again"):
        sample(predict, noise, config.sample.method, 3)
    with pytest.raises(ConfigError, match="sample.method = 'eulr': must be one of euler, .*; did you mean euler"):
        small("sample.method=eulr")
