"""Upcycling: what the new model computes follows from the old one, and it trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import run

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.state import State, model_shapes
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.upcycle import Prototypes, _load_model, cluster, from_dense, grow, moe_inputs

SMALL = ["model.hidden_size=32", "model.depth=2", "model.heads=2", "train.global_batch=8", "train.log_every=1"]
PROMOE = ["model.router=promoe", "model.num_experts=4"]


def state_of(*settings: str, seed: int = 0) -> State:
    """A model whose every tensor is random, so that every path matters."""
    config = resolve("digits", overrides=[*SMALL, *settings])
    shapes, _ = model_shapes(config.model)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    kinds = ("master", "ema")
    return State(Path("made"), "made", config, 7, 7, kinds, shapes, {}, lambda kind, name: tensors[name])


def output(state: State, null: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(6, 1, 8, 8, generator=generator)
    t_B = torch.rand(6, generator=generator) * 1000
    y_B = torch.full((6,), state.config.model.null_class) if null else torch.arange(6)
    return _load_model(state, "ema")(x_BCHW, t_B, y_B, 0 if null else 6)[0]


BLOCKS = ("model.activation=swiglu", "model.norm=rms", "model.qk_norm=rms", "model.positions=rope")
BLOCKS = (*BLOCKS, "model.modulation=shared")


def made_from_dense(noise: float, how: str = "slice", *settings: str) -> tuple[State, State]:
    dense = state_of("model.router=dense", *(setting for setting in settings if setting in BLOCKS))
    config = resolve("digits", overrides=[*SMALL, *PROMOE, *settings])
    prototypes = {b: cluster(x, config) for b, x in moe_inputs(dense, config, images=32).items()}
    return dense, from_dense(dense, config, prototypes, how, noise)


@pytest.mark.parametrize("how, settings", [("slice", ()), ("copy", ("model.expert_ratio=4.0",)), ("slice", BLOCKS)])
def test_for_the_null_class_a_dense_model_and_its_promoe_are_one(how, settings):
    dense, made = made_from_dense(0.0, how, *settings)
    torch.testing.assert_close(output(made, null=True), output(dense, null=True), rtol=1e-4, atol=1e-5)


def test_for_classes_they_differ_by_the_gates_spread_alone():
    dense, made = made_from_dense(0.0)
    config = made.config
    fresh = from_dense(dense, config, {1: Prototypes(torch.randn(4, 32), 1e3)})  # a scale that silences the experts
    error = (output(made) - output(dense)).norm() / output(dense).norm()
    silent = (output(fresh) - output(dense)).norm() / output(dense).norm()
    assert error < 0.5 * silent


def test_a_slice_has_all_hidden_units_once():
    dense, made = made_from_dense(0.0)
    full = dense.read("ema", "blocks.1.mlp.fc1.weight")
    shared = made.read("ema", "blocks.1.mlp.shared.fc1.weight")
    routed = made.read("ema", "blocks.1.mlp.experts.fc1.weight")
    for expert in routed:
        assert torch.equal(torch.cat([shared, expert]), full)


def test_noise_changes_only_the_routed_experts_and_is_seeded():
    dense, made = made_from_dense(0.1)
    name = "blocks.1.mlp.experts.fc1.weight"
    routed = made.read("ema", name)
    assert not any(torch.equal(routed[0], other) for other in routed[1:])
    assert torch.equal(routed, made.read("master", name)), "read twice, noise is the same"
    half = dense.read("ema", "blocks.1.mlp.fc1.weight")[64:]
    assert ((routed[0] - half).std() / half.std()).item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(made.read("ema", "blocks.1.mlp.unconditional.fc1.weight"), half)


@pytest.mark.parametrize("router_input", ["modulated", "unmodulated"])
def test_prototypes_are_of_the_tokens_that_the_router_scores(router_input):
    """Unmodulated ones are normalised; of the dense model's own kind in both cases."""
    dense = state_of("model.router=dense")
    config = resolve("digits", overrides=[*SMALL, *PROMOE, f"model.router_input={router_input}"])
    for x_TD in moe_inputs(dense, config, images=8).values():
        is_normalised = torch.allclose(x_TD.var(-1, unbiased=False), torch.ones(len(x_TD)), atol=1e-3)
        assert is_normalised == (router_input == "unmodulated") and x_TD.shape == (8 * 16, 32)


def test_prototypes_are_the_clusters_of_tokens():
    generator = torch.Generator().manual_seed(2)
    centre_ED = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1)
    tokens = (centre_ED.repeat(50, 1) + 0.05 * torch.randn(200, 32, generator=generator)) * 3
    prototypes = cluster(tokens, resolve("digits", overrides=[*SMALL, *PROMOE]))
    assert (prototypes.prototype_ED @ centre_ED.T).max(dim=0).values.min() > 0.98
    assert prototypes.mean_weight > 0.9
    with pytest.raises(ConversionError, match="3 tokens for 4 prototypes"):
        cluster(tokens[:3], resolve("digits", overrides=[*SMALL, *PROMOE]))


@pytest.mark.parametrize("router", ["promoe", "promoe_ec"])
def test_the_mean_weight_of_a_softmax_gate_is_that_of_the_router(router):
    """Over experts by token choice, over the 16 tokens of an image by expert choice; however small it is."""
    tokens = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    config = resolve(
        "digits", overrides=[*SMALL, f"model.router={router}", "model.num_experts=4", "model.score_function=softmax"]
    )
    prototypes = cluster(tokens, config)
    score_TE = torch.nn.functional.normalize(tokens, dim=-1) @ prototypes.prototype_ED.T
    best_T = score_TE.argmax(-1)
    weights = [
        (score_TE[t] if router == "promoe" else score_TE[t // 16 * 16 : t // 16 * 16 + 16, e]).exp()
        for t, e in enumerate(best_T.tolist())
    ]
    expected = sum(
        float(w[e if router == "promoe" else t % 16] / w.sum())
        for (t, e), w in zip(enumerate(best_T.tolist()), weights, strict=True)
    )
    assert prototypes.mean_weight == pytest.approx(expected / 64, rel=1e-5)


def test_a_softmax_over_tokens_does_not_change_with_the_number_of_experts():
    """So that the experts of a grown expert-choice model need no larger outputs."""
    small = state_of("model.router=promoe_ec", "model.num_experts=4", "model.score_function=softmax")
    big = grow(small, replace(small.config, model=replace(small.config.model, num_experts=8)), noise=0, spread=0)
    name = "blocks.1.mlp.experts.fc2.weight"
    assert torch.equal(big.read("ema", name), small.read("ema", name).repeat(2, 1, 1))


@pytest.mark.parametrize("gate", ["identity", "softmax"])
def test_twice_the_experts_without_noise_compute_the_same(gate):
    small = state_of(*PROMOE, f"model.score_function={gate}")
    big = grow(small, replace(small.config, model=replace(small.config.model, num_experts=8)), noise=0, spread=0)
    torch.testing.assert_close(output(big), output(small), rtol=1e-5, atol=1e-6)
    noisy = grow(small, big.config)
    routed = noisy.read("ema", "blocks.1.mlp.experts.fc1.weight")
    assert routed.shape[0] == 8 and not torch.equal(routed[0], routed[4])
    gap = (output(noisy) - output(small)).norm() / output(small).norm()
    assert 0 < gap < 0.1


def test_all_mismatches_are_reported_together():
    dense = state_of("model.router=dense")
    config = resolve("digits", overrides=[*SMALL, *PROMOE, "model.depth=4", "model.expert_ratio=1.5"])
    with pytest.raises(ConversionError, match="model.depth = 4.*\n.*model.expert_ratio = 1.5"):
        from_dense(dense, config, {})
    several = ["model.num_shared_experts=2", "model.num_unconditional_experts=2", "model.expert_width=48"]
    config = resolve("digits", overrides=[*SMALL, *PROMOE, *several, "model.shared_expert_width=64"])
    with pytest.raises(ConversionError) as error:
        from_dense(dense, config, {})
    for part in (
        "model.expert_width = 48: must divide the MLP's 128",
        "model.num_shared_experts = 2: must be 1",
        "model.num_unconditional_experts = 2: must be 1",
        "model.shared_expert_width = 64: must be 0",
    ):
        assert part in str(error.value)
    small = state_of(*PROMOE)
    six = replace(small.config, model=replace(small.config.model, num_experts=6))
    with pytest.raises(ConversionError, match="num_experts = 6: must be a multiple of the source's 4"):
        grow(small, six)


def train_on(folder: Path) -> dict:
    from megapromoe.checkpoint.manager import resume
    from megapromoe.distributed.mesh import make_mesh
    from megapromoe.engine.averaged_weights import EMA
    from megapromoe.engine.engine import Engine
    from megapromoe.nn.parallelize import build

    config = resolve(file=folder / "config.yaml")
    mesh = make_mesh()
    engine = Engine(build(config, mesh), config, mesh)
    checkpoint = resume(folder / "checkpoints", engine, EMA(engine, config.train.ema_decays)).checkpoint
    losses = []
    generator = torch.Generator().manual_seed(0)
    x_BCHW, target = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(8, 1, 8, 8, generator=generator)
    for _ in range(8):

        def loss(prediction, auxiliary):
            mse = (prediction[:, :1] - target).square().mean()
            return mse + auxiliary.total(), mse.detach()

        losses.append(float(engine.micro_step(x_BCHW, torch.full((8,), 500.0), torch.arange(8), 8, loss=loss)))
        engine.step(1e-3)
    engine.close()
    return {"step": checkpoint.manifest["step"], "losses": losses}


def test_the_tool_makes_runs_that_train(tmp_path, capsys):
    dense = state_of("model.router=dense")
    export(replace(dense, kinds=("master", "ema")), tmp_path / "dense", "ours")
    command = [str(tmp_path / "dense"), str(tmp_path / "promoe"), "model.num_experts=4", "--num-images", "8"]
    assert main(["upcycle", *command]) == 0
    result = run(1, train_on, tmp_path / "promoe")[0]
    assert result["step"] == 0 and result["losses"][-1] < result["losses"][0]
    state = open_state(tmp_path / "promoe")
    assert not any(state.read(kind, name).any() for kind in ("exp_avg", "exp_avg_sq") for name in state.shapes)

    assert main(["upcycle", str(tmp_path / "promoe"), str(tmp_path / "more"), "model.num_experts=8"]) == 0
    assert open_state(tmp_path / "more").shapes["blocks.1.mlp.router.prototypes"] == (8, 32)
    assert main(["upcycle", str(tmp_path / "promoe"), str(tmp_path / "other"), "model.num_experts=6"]) == 1
    assert "must be a multiple" in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path / "promoe"), str(tmp_path / "other"), "model.num_experts=0"]) == 2
