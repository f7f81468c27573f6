"""DeepSpeed's files: those of the package, a user's own, and refused contents and combinations.

`test_deepspeed_file.py` has each key that is refused.
"""

import json
from dataclasses import replace

import pytest

from megapromoe.config.deepspeed_file import find_ds_configs, load_deepspeed
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.resolve import resolve


def violations(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        resolve("digits", overrides=overrides)
    return raised.value.violations


def deepspeed_file(tmp_path, text):
    path = tmp_path / "own.json"
    path.write_text(text)
    return f"train.deepspeed={path}"


def test_shipped_deepspeed_files_are_valid():
    names = sorted(p.stem for p in find_ds_configs().glob("*.json"))
    assert len(names) == 8
    for name in names:
        content = load_deepspeed(resolve("digits", overrides=[f"train.deepspeed={name}"]))
        assert f"zero{content['zero_optimization']['stage']}" in name
        assert content.get("bf16", {}).get("enabled", False) == name.startswith("bf16")
        assert ("offload_optimizer" in content["zero_optimization"]) == name.endswith("offload")


def test_own_deepspeed_file(tmp_path):
    text = json.dumps({"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True})
    config = resolve("digits", overrides=[deepspeed_file(tmp_path, text)])
    assert load_deepspeed(config) == json.loads(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            '{"train_batch_size": 8}',
            "'train_batch_size' is set by the run's configuration; remove it and set train.glo",
        ),
        ('{"gradient_clipping": 1.0}', "set train.max_grad_norm"),
        ('{"optimizer": {}}', "set train.optimizer"),
        ('{"expert_parallel": {}}', "set parallel.ep"),
        ('{"fp16": {"enabled": true}}', "'fp16' is not supported"),
        ('{"bf16": true}', "'bf16' must be an object"),
        ('{"data_types": 1}', "'data_types' must be an object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage = 4 must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 1}', "must be an object"),
        ('{"zero_optimization": {"stage": 1, "reduce_scatter": false}}', "reduce_scatter must be true"),
        (
            '{"zero_optimization": {"stage": 2, "contiguous_gradients": false}}',
            "contiguous_gradients must be true",
        ),
        ("[]", "must hold an object"),
        ("{} // note", "is not strict JSON"),
        ('{"steps_per_print": NaN}', "NaN is not a JSON number"),
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' occurs twice"),
    ],
)
def test_deepspeed_file_rules(tmp_path, text, expected):
    (violation,) = violations(deepspeed_file(tmp_path, text))
    assert expected in violation and violation.startswith("train.deepspeed = ")


BF16 = {"enabled": True}


@pytest.mark.parametrize(
    "reason, content",
    [
        ("leaves experts out of its fp32 masters' norm", {"bf16": BF16, "zero_optimization": {"stage": 0}}),
        ("stage 0", {"bf16": BF16}),
        (
            "grad_accum_dtype",
            {"bf16": BF16, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        ),
        ("offload", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
        ("offload", {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}),
        ("loss scaling", {"fp16": {"enabled": True}}),
    ],
)
def test_unsupported_deepspeed_combinations_are_refused_with_the_reason(tmp_path, reason, content):
    (violation,) = violations(deepspeed_file(tmp_path, json.dumps(content)))
    assert violation.startswith("train.deepspeed = ") and reason in violation and "; use " in violation


def test_deepspeed_combinations_are_reported_with_all_other_violations(tmp_path):
    file = deepspeed_file(tmp_path, json.dumps({"bf16": BF16, "zero_optimization": {"stage": 0}}))
    messages = violations(file, "train.lr=-1")
    assert len(messages) == 2 and any("stage 0" in v for v in messages) and any("train.lr" in v for v in messages)


def test_loading_a_wrong_deepspeed_file_raises():
    config = replace(Config(), train=replace(Config().train, deepspeed="none"))
    with pytest.raises(ConfigError, match="known: bf16_zero1, bf16_zero2"):
        load_deepspeed(config)
