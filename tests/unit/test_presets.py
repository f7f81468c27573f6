"""Every preset resolves, alone and over many ranks, and says what the published tables say."""

from dataclasses import replace

import pytest
import torch

from megapromoe.config.model_options import UNROUTED
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.nn.dit import DiT
from megapromoe.planning.cost import flops_per_image, parameters


def test_the_names():
    names = "promoe_s promoe_b promoe_l promoe_xl promoe_l_ec dit_b dit_l dit_xl tc_l_e8 ec_l_e8"
    names += " diffmoe_b_e8 diffmoe_l_e8 diffmoe_xl_e8 digits fashion scenes t2i_3b tc_t2i_12b promoe_t2i_12b"
    names += " dense_conditional_b dense_conditional_l dense_conditional_xl"
    names += " promoe_s_fine promoe_b_fine promoe_l_fine promoe_xl_fine"
    names += " promoe_l_k3 promoe_b_ddpm promoe_l_ddpm promoe_xl_ddpm diffmoe_l_e16"
    names += " tc_l_e8_bias gmm_l gmm_l_k3 race_b_e8 race_l_e8"
    assert set(PRESETS) == set(names.split())


@pytest.mark.parametrize("name", PRESETS)
def test_resolves_on_one_rank_and_on_eight(name):
    resolve(name, world=1)
    model = resolve(name).model
    experts = [] if model.router in UNROUTED else [f"parallel.ep={8 if model.num_experts >= 8 else 4}"]
    tensor = ["parallel.tp=2"]
    config = resolve(name, overrides=experts + tensor, world=8)
    assert config.layout(8).micro_batch == config.train.global_batch // 4


# Published: total, trainable, active parameters; trainable and active are not published for every model.
COUNTS = {
    "promoe_s": (75_543_584, 75_445_280, 32_993_312),
    "promoe_b": (300_607_520, 300_410_912, 130_572_320),
    "promoe_l": (1_062_684_704, 1_062_422_560, 458_262_560),
    "promoe_l_ec": (1_062_684_704, 1_062_422_560, 458_262_560),
    "promoe_xl": (1_567_733_792, 1_567_438_880, 675_339_296),
    "promoe_b_ddpm": (300_607_520, 300_410_912, 130_572_320),
    "promoe_l_ddpm": (1_062_684_704, 1_062_422_560, 458_262_560),
    "promoe_xl_ddpm": (1_567_733_792, 1_567_438_880, 675_339_296),
    "promoe_l_k3": (1_062_684_704, 1_062_422_560, 558_999_584),
    "gmm_l": (1_062_832_304, 1_062_570_160, 458_410_160),
    "gmm_l_k3": (1_062_832_304, 1_062_570_160, 559_147_184),
    "dit_b": (130_512_416, None, 130_512_416),
    "dit_l": (458_102_816, None, 458_102_816),
    "dit_xl": (675_129_632, None, 675_129_632),
    "tc_l_e8": (1_163_274_272, None, 458_201_120),
    "tc_l_e8_bias": (1_163_274_272, None, 458_201_120),
    "ec_l_e8": (1_163_274_272, None, 458_201_120),
    "diffmoe_b_e8": (332_471_888, None, None),
    "diffmoe_l_e8": (1_175_967_872, None, None),
    "race_b_e8": (332_435_024, None, None),
    "race_l_e8": (1_175_869_568, None, None),
    "diffmoe_xl_e8": (1_734_997_392, None, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    total, trainable, active = COUNTS[name]
    counted = parameters(resolve(name).model)
    assert counted.total == total
    assert trainable in (None, counted.trainable)
    assert active in (None, counted.active)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_conditional_routing_alone_is_promoe_without_routed_experts(size):
    """Only the router differs; a token passes what it passes in ProMoE but the prototypes, and in DiT but a bias."""
    promoe, conditional, dit = (resolve(f"{name}_{size}") for name in ("promoe", "dense_conditional", "dit"))
    assert replace(promoe, model=replace(promoe.model, router="conditional")) == conditional
    active, blocks = parameters(conditional.model).active, len(conditional.model.conditional_blocks)
    assert active == parameters(promoe.model).active - 12 * blocks * conditional.model.hidden_size
    assert active == parameters(dit.model).active + blocks * conditional.model.hidden_size
    with torch.device("meta"):
        assert parameters(conditional.model).trainable == sum(p.numel() for p in DiT(conditional.model).parameters())


# Total, trainable and active parameters, and the active ones more than ProMoE's.
FINE = {
    "s": (75_630_176, 75_531_872, 32_978_528, -14_784),
    "b": (300_780_896, 300_584_288, 130_542_944, -29_376),
    "l": (1_053_802_208, 1_053_540_064, 458_282_720, 20_160),
    "xl": (1_568_340_832, 1_568_045_920, 675_236_704, -102_592),
}


@pytest.mark.parametrize("size", FINE)
def test_fine_grained_experts_have_the_active_parameters_of_promoe(size):
    """48 experts, 4 for a token, with SwiGLU: within 0.05 % of ProMoE's; to the last parameter the built model's."""
    fine, promoe = resolve(f"promoe_{size}_fine"), resolve(f"promoe_{size}")
    counted, model = parameters(fine.model), fine.model
    more = counted.active - parameters(promoe.model).active
    assert (counted.total, counted.trainable, counted.active, more) == FINE[size]
    assert (
        abs(more) < 5e-4 * counted.active
        and abs(flops_per_image(model).forward / flops_per_image(promoe.model).forward - 1) < 2e-3
    )
    assert (model.num_experts, model.top_k, model.activation) == (48, 4, "swiglu")
    # Rows of 16 bytes in bf16 for grouped products, and widths that tensor parallelism divides.
    assert not any(width % 8 for width in (model.moe_width, model.shared_width, model.mlp_width))
    assert (fine.data, fine.train, fine.sample) == (promoe.data, promoe.train, promoe.sample)
    with torch.device("meta"):
        assert counted.trainable == sum(p.numel() for p in DiT(model).parameters())


def test_published_recipe():
    config = resolve("promoe_l")
    train = config.train
    assert (train.global_batch, train.lr, train.beta1, train.beta2, train.weight_decay) == (
        256,
        1e-4,
        0.9,
        0.999,
        0,
    )
    assert (train.warmup, train.max_grad_norm, train.ema_decay, train.steps) == (0, 0.5, 0.9999, 500_000)
    assert (config.sample.method, config.sample.steps) == ("euler", 250)
    assert config.data.flip and config.data.condition_dropout == 0.1
    assert (config.diffusion.objective, config.diffusion.time) == ("rf", "logit_normal")


def test_rows_of_the_paper_under_ddpm():
    for size, weight in (("b", 10.0), ("l", 1.0), ("xl", 1.0)):
        config = resolve(f"promoe_{size}_ddpm")
        assert config.model.rcl_weight == weight, "10 for B alone"
        assert (config.diffusion.objective, config.sample.method, config.sample.steps) == ("ddpm", "ddpm", 250)
        assert config.model.router == "promoe_ec" and config.model.learn_sigma
        flow = resolve(f"promoe_{size}")
        assert config.train == flow.train and config.data == flow.data


def test_diffmoe_with_16_experts_is_that_with_8_and_8_more():
    eight, sixteen = (resolve(f"diffmoe_l_e{n}").model for n in (8, 16))
    assert replace(eight, num_experts=16) == sixteen
    counted = parameters(sixteen)
    assert counted.total == 1_981_962_464
    with torch.device("meta"):
        built = sum(p.numel() for p in DiT(sixteen).parameters())
    assert built == counted.trainable


@pytest.mark.parametrize(
    "name, billions, active", [("t2i_3b", 3.0, 3.0), ("tc_t2i_12b", 12.8, 3.0), ("promoe_t2i_12b", 12.8, 3.0)]
)
def test_text_to_image_models_have_the_stated_sizes(name, billions, active):
    """The paper's "12 B, 3 B active", from the inferred shape; to the last parameter those of the built model."""
    model = resolve(name).model
    counted = parameters(model)
    assert counted.total / 1e9 == pytest.approx(billions, abs=0.1) and counted.active / 1e9 == pytest.approx(
        active, abs=0.1
    )
    with torch.device("meta"):
        assert counted.trainable == counted.total == sum(p.numel() for p in DiT(model).parameters())
    dense = parameters(resolve("t2i_3b").model)
    assert counted.active - dense.active == counted.by_part.get("router", 0), "a token passes one FFN in all three"
