"""The configuration: layering, every rule, one message for all violations."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import yaml

from megapromoe.config.layout import Layout
from megapromoe.config.options import Config, ConfigError, to_dict
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import check, check_trainable, resolve, to_yaml

FIXED = ("model.hidden_size=96", "train.lr=0.001")  # the preset is tuned now and then; the sentences are not


def violations(*overrides, preset="digits", **kwargs):
    base = FIXED if preset == "digits" else ()
    with pytest.raises(ConfigError) as raised:
        resolve(preset, overrides=(*base, *overrides), **kwargs)
    return raised.value.violations


def test_layers_override_each_other_in_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 1e-5, steps: 70}\nmodel: {depth: 6}\n")
    config = resolve("digits", file, ["train.steps=90"])
    assert (config.train.steps, config.train.lr, config.model.depth) == (90, 1e-5, 6)
    assert config.model.hidden_size == resolve("digits").model.hidden_size != Config().model.hidden_size


def test_yaml_round_trip(tmp_path):
    config = resolve("tc_l_e8", overrides=["train.eps=1e-9", "parallel.expert_tp=true", "model.score_function=softmax"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(file=file) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_frozen_and_every_field_is_explained():
    with pytest.raises(FrozenInstanceError):
        Config().train.lr = 1.0
    for section in fields(Config):
        for f in fields(section.type):
            assert f.metadata["help"], f"{section.name}.{f.name}"


UNITS = "blocks channels images micro-batches minutes pixels ranks seconds steps threads tokens"
COUNTED = "batches checkpoints classes experts heads saves samples snapshots updates"
WITHOUT_UNIT = (
    "decay epsilon factor learning_rate mean multiple norm probability scale seed shift temperature time weight"
)


def test_every_number_is_explained_with_its_unit():
    known = {word.replace("_", " ") for word in (*UNITS.split(), *COUNTED.split(), *WITHOUT_UNIT.split())}
    known |= {"standard deviation"}
    for section in fields(Config):
        for f in fields(section.type):
            if f.type in (int, float):
                words = set(re.findall(r"[\w-]+", f.metadata["help"]))
                assert any(set(unit.split()) <= words for unit in known), f"{section.name}.{f.name}"


def test_without_a_preset_the_user_chooses_the_data(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text("model: {hidden_size: 64, heads: 2}\n")
    with pytest.raises(ConfigError, match="data.source = 'unset': no training data is chosen: give data.source"):
        check_trainable(resolve(file=file))


def test_derived_values():
    model = resolve("promoe_l").model
    assert (model.tokens, model.moe_width, model.null_class, model.out_channels) == (256, 2048, 1000, 8)
    assert model.moe_blocks == tuple(range(1, 24, 2))
    assert replace(model, moe_every=1).moe_blocks == tuple(range(24))
    assert replace(model, router="dense").moe_blocks == ()
    assert replace(model, top_k=2).expert_capacity == 42


def test_widths_and_numbers_of_experts():
    model = replace(resolve("promoe_l").model, hidden_size=960, expert_ratio=245 / 960)
    assert model.moe_width == 244  # a ratio is rounded down, which a width is not
    model = replace(model, expert_width=245)
    assert (model.moe_width, model.shared_width) == (245, 245)
    assert (model.shared_experts, model.unconditional_experts) == (1, 1)
    model = replace(model, shared_expert_width=100, num_shared_experts=3, num_unconditional_experts=2)
    assert (model.moe_width, model.shared_width) == (245, 100)
    assert (model.shared_experts, model.unconditional_experts) == (3, 2)
    for without in ({"router": "tc"}, {"shared_expert": False, "unconditional_expert": False}):
        bare = replace(model, **without)
        assert (bare.shared_experts, bare.unconditional_experts) == (0, 0)


@pytest.mark.parametrize("router, top_k, tokens, count", [
    ("promoe_ec", 1, 256, 21), ("promoe_ec", 2, 5, 1), ("promoe_ec", 1, 5, 1), ("promoe_ec", 12, 5, 5),
    ("ec", 1, 5, 0), ("diffmoe", 1, 5, 1), ("diffmoe", 1, 0, 0), ("diffmoe", 1, 1000, 83),
])  # fmt: skip
def test_tokens_of_an_expert(router, top_k, tokens, count):
    """As published: int(tokens / E · K), and for ProMoE at least one; where there are any."""
    model = replace(resolve("promoe_l").model, router=router, top_k=top_k)
    assert model.tokens_per_expert(tokens) == count


@pytest.mark.parametrize(
    "world, overrides, layout",
    [
        (1, [], Layout(1, 1, 1, 1, 1, 1, 128)),
        (8, ["parallel.tp=2", "parallel.ep=4"], Layout(8, 2, 4, 4, 2, 1, 32)),
        (8, ["parallel.tp=2", "parallel.ep=4", "parallel.expert_tp=true"], Layout(8, 2, 4, 4, 1, 2, 32)),
        (8, ["parallel.tp=4", "parallel.ep=1", "train.accumulation=2"], Layout(8, 4, 1, 2, 8, 1, 32)),
        (8, ["parallel.ep=8", "model.num_experts=12"], Layout(8, 1, 8, 8, 1, 1, 16)),
    ],
)
def test_layout(world, overrides, layout):
    assert resolve("digits", overrides=overrides, world=world).layout(world) == layout


def test_a_layout_that_does_not_divide_raises():
    with pytest.raises(ConfigError, match=r"parallel\.tp = 2: must divide the 3 ranks; nearest: 1, 3"):
        resolve("digits", overrides=["parallel.tp=2"]).layout(3)


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "model.hiden_size=3",
            "model.hiden_size = '3' (command line): 'hiden_size' is not a key of model; did you mean",
        ),
        ("modl.depth=3", "modl.depth = '3' (command line): 'modl' is not a section; did you mean model?"),
        ("depth=3", "'depth' is not a section"),
        ("model.depth", "'model.depth' (command line): must be section.key=value"),
        ("model.depth=2.5", "model.depth = '2.5' (command line): must be a whole number"),
        ("model.depth=true", "must be a whole number"),
        ("model.depth=[", "must be a whole number"),
        ("model.learn_sigma=1", "must be true or false"),
        ("model.qk_norm=1", "must be one of none, layer, rms"),
        ("train.lr=fast", "must be a finite number"),
        ("train.lr=inf", "must be a finite number"),
        ("train.lr=true", "must be a finite number"),
        ("model.depth=0", "model.depth = 0: must lie in [1, inf)"),
        ("train.lr=0", "train.lr = 0.0: must lie in (0, inf)"),
        ("data.condition_dropout=1", "data.condition_dropout = 1.0: must lie in [0, 1)"),
        ("sample.guidance_high=1.5", "sample.guidance_high = 1.5: must lie in [0, 1]"),
        (
            "model.score_function=sigmod",
            "model.score_function = 'sigmod': must be one of identity, sigmoid, softmax; did you mean",
        ),
        ("model.heads=7", "model.heads = 7: must divide model.hidden_size = 96; nearest: 4, 6, 8, 12"),
        ("model.hidden_size=92", None),
        ("model.patch_size=3", "model.patch_size = 3: must divide model.input_size = 8; nearest: 1, 2, 4, 8"),
        ("model.top_k=5", "model.top_k = 5: must be at most model.num_experts = 4"),
        ("model.moe_every=5", "model.moe_every = 5: must be at most model.depth = 4"),
        (
            "model.expert_ratio=0.001",
            "model.expert_ratio = 0.001: times model.hidden_size = 96 must be at least 1",
        ),
        ("parallel.tp=3", "parallel.tp = 3: must divide model.heads = 4; nearest: 1, 2, 4"),
        ("parallel.ep=5", "parallel.ep = 5: must be at most model.num_experts = 4"),
        ("parallel.ep=4", None),
        (
            "sample.method=ddim",
            "sample.method = 'ddim': must be euler, heun, unipc or dpm_solver++ with diffusion.objective = 'rf'",
        ),
        ("sample.guidance_low=1", None),
        ("data.flip=true", "data.flip = True: must be false with data.source = 'digits'"),
        ("model.num_classes=11", "model.num_classes = 11: must be 10 with data.source = 'digits'"),
        ("train.warmup=99999", "train.warmup = 99999: must be at most train.steps"),
        ("train.min_lr=1", "train.min_lr = 1.0: must be at most train.lr = 0.001"),
        ("train.deepspeed=fp32_zero9", "did you mean fp32_zero"),
        ("train.deepspeed=12", "train.deepspeed = '12': cannot be read"),
    ],
)
def test_one_wrong_value_is_one_violation(override, expected):
    if expected is None:
        resolve("digits", overrides=[override])
    else:
        (violation,) = violations(override)
        assert expected in violation


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["model.hidden_size=90", "model.heads=3"], "model.hidden_size = 90: must be a multiple of 4"),
        (["model.router=dense", "parallel.ep=2"], "parallel.ep = 2: must be 1 with model.router = 'dense'"),
        (
            ["model.router=ec", "model.num_experts=17"],
            "model.num_experts = 17: must be at most 16 = tokens * top_k",
        ),
        (
            ["model.mlp_ratio=1.025", "parallel.tp=4"],
            "must divide hidden_size * mlp_ratio = 98; nearest: 1, 2, 7, 14",
        ),
        (["model.expert_ratio=1.025", "parallel.tp=4"], "must divide hidden_size * expert_ratio = 98"),
        (["model.expert_width=98", "parallel.tp=4"], "must divide model.expert_width = 98; nearest: 1, 2, 7, 14"),
        (["model.shared_expert_width=98", "parallel.tp=4"], "must divide model.shared_expert_width = 98"),
        (
            ["model.num_shared_experts=2", "model.shared_expert=false"],
            "model.num_shared_experts = 2: must be 1 with model.shared_expert = false",
        ),
        (
            ["model.shared_expert_width=64", "model.shared_expert=false"],
            "model.shared_expert_width = 64: must be 0 with model.shared_expert = false",
        ),
        (
            ["model.num_unconditional_experts=2", "model.unconditional_expert=false"],
            "model.num_unconditional_experts = 2: must be 1 with model.unconditional_expert = false",
        ),
        (
            ["model.num_unconditional_experts=2", "model.router=tc"],
            "must be 1 with model.router = 'tc', which has no unconditional expert",
        ),
        (["diffusion.objective=ddpm"], "sample.method = 'euler': must be ddpm, ddim, unipc or dpm_solver++ with"),
        (
            ["diffusion.objective=ddpm", "sample.method=ddim", "model.learn_sigma=false"],
            "model.learn_sigma = False: must be true",
        ),
        (
            ["diffusion.objective=ddpm", "sample.method=ddpm", "sample.steps=1001"],
            "sample.steps = 1001: must be at most 1000",
        ),
        (
            ["sample.guidance_low=0.7", "sample.guidance_high=0.3"],
            "sample.guidance_low = 0.7: must be at most sample.guidance_high = 0.3",
        ),
    ],
)
def test_combinations(overrides, expected):
    messages = violations(*overrides)
    assert len(messages) == 1 and expected in messages[0]


@pytest.mark.parametrize(
    "world, overrides, expected",
    [
        (
            6,
            ["parallel.tp=4", "train.global_batch=96"],
            "parallel.tp = 4: must divide the 6 ranks; nearest: 2, 3, 6",
        ),
        (
            6,
            ["parallel.ep=4", "train.global_batch=96"],
            "parallel.ep = 4: must divide the 6 ranks; nearest: 2, 3, 6",
        ),
        (
            4,
            ["parallel.tp=2", "parallel.ep=4", "parallel.expert_tp=true"],
            "parallel.ep = 4: must divide the 4 ranks / tp = 2 with parallel.expert_tp; nearest: 1, 2",
        ),
        (
            4,
            ["train.global_batch=30", "train.accumulation=2"],
            "train.global_batch = 30: must be a multiple of 4 data ranks * 2 micro-batches; nearest: 24, 32",
        ),
        (4, ["train.global_batch=2"], "nearest: 4"),
        (
            8,
            ["parallel.shard_ranks=3"],
            "parallel.shard_ranks = 3: must divide the 8 ranks and be a multiple of tp = 1; use 1 or 2 or 4 or 8, or 0"
            " for all ranks",
        ),
        (
            12,
            ["parallel.tp=2", "parallel.ep=4", "parallel.shard_ranks=6", "train.global_batch=96"],
            "parallel.shard_ranks = 6: must divide the 12 ranks and be a multiple of tp = 2, and be a multiple of the 4"
            " ranks that hold all experts or at most as many; use 2 or 4 or 12, or 0 for all ranks",
        ),
        (0, [], "parallel.tp = 1: needs at least 1 rank, not 0"),
    ],
)
def test_rules_on_ranks_apply_once_their_number_is_known(world, overrides, expected):
    resolve("digits", overrides=overrides)
    (violation,) = violations(*overrides, world=world)
    assert violation.endswith(expected)


def test_everything_wrong_is_in_one_message(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {hidden: 3, depth: many}\ntrain: 5\ntrian: 5\n")
    overrides = ["parallel.tp=3", "train.deepspeed=none", "train.lr=-1", "model.heads=x"]
    with pytest.raises(ConfigError) as raised:
        resolve("digits", file, overrides, world=4)
    message = str(raised.value)
    for part in (
        "model.hidden",
        "model.depth",
        "train = 5",
        "did you mean train?",
        "none",
        "train.lr",
        "heads",
    ):
        assert part in message
    assert message.startswith("8 problems") and message.count("\n") == 8
    assert str(file) in message


def test_a_refused_value_is_reported_once():
    """A rule on a field whose value was already refused would only repeat or mislead."""
    (violation,) = violations("model.heads=many", "parallel.tp=2")
    assert "a whole number" in violation
    assert len(violations("model.hidden_size=-3")) == 1


def test_a_missing_layer_hides_the_rules_that_depend_on_it(tmp_path):
    assert len(violations(preset="digts")) == 1
    (missing, wrong) = violations("train.lr=-1", preset=None, file=tmp_path / "none.yaml")
    assert "cannot be read" in missing and "train.lr" in wrong


@pytest.mark.parametrize("text, expected", [("- 1", "must be a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_config(tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    (violation,) = violations(file=file)
    assert expected in violation and str(file) in violation


def test_check_covers_configs_made_by_hand():
    config = resolve("digits")
    check(config, world=4)
    broken = replace(config, train=replace(config.train, lr="high", global_batch=30), model=Config().model)
    with pytest.raises(ConfigError) as raised:
        check(broken, world=4)
    assert {v.split(" = ")[0] for v in raised.value.violations} == {
        "train.lr",
        "train.global_batch",
        "model.in_channels",
        "model.input_size",
        "model.num_classes",
    }


# ---- the warm-up


@pytest.mark.parametrize("preset", ["digits", "fashion"])
def test_the_preset_s_warm_up_shrinks_with_the_training(preset, tmp_path):
    preset_warmup = PRESETS[preset]["train"]["warmup"]
    assert resolve(preset).train.warmup == preset_warmup, "the preset's own length"
    for steps, warmup in (
        (10 * preset_warmup, preset_warmup),
        (10 * preset_warmup - 1, preset_warmup - 1),
        (50, 5),
        (5, 0),
        (1, 0),
        (10**6, preset_warmup),
    ):
        assert resolve(preset, overrides=[f"train.steps={steps}"]).train.warmup == warmup
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 50}")
    assert resolve(preset, file).train.warmup == 5


def test_a_warm_up_that_the_user_wrote_stays_or_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {warmup: 30}")
    assert resolve("digits", file, ["train.steps=30"]).train.warmup == 30
    assert resolve("digits", overrides=["train.steps=40", "train.warmup=30"]).train.warmup == 30
    for settings in (("digits", file, ["train.steps=5"]), ("digits", None, ["train.steps=5", "train.warmup=30"])):
        with pytest.raises(ConfigError, match="train.warmup = 30: must be at most train.steps = 5"):
            resolve(*settings)


def test_a_run_keeps_its_warm_up_unless_another_is_written():
    assert resolve("digits", overrides=["train.steps=9000"], run_warmup=2).train.warmup == 2
    assert resolve("digits", overrides=["train.warmup=7"], run_warmup=2).train.warmup == 7
    assert resolve("promoe_s", run_warmup=2).train.warmup == 0, "no preset's"
    with pytest.raises(ConfigError, match="train.warmup = 30: must be at most train.steps = 5"):
        resolve("digits", overrides=["train.steps=5"], run_warmup=30)
