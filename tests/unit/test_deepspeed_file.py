"""DeepSpeed's own JSON: each key that training does not support is refused by `show`, with the rule and the remedy."""

import json

import pytest

from megapromoe import cli
from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.deepspeed_keys import OURS, REFUSED, SUPPORTED, has_no_effect, names_in
from megapromoe.config.resolve import resolve
from megapromoe.distributed import launch_environment, runtime
from megapromoe.distributed.launch_environment import LaunchEnvironment


def nested(key: str, value) -> dict:
    """A file's content with one key, given by its dotted name."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def merged(*contents: dict) -> dict:
    result: dict = {}
    for content in contents:
        for key, value in content.items():
            inner = result.get(key)
            result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def written(tmp_path, content) -> str:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    return f"train.deepspeed={path}"


def refused_by_show(setting: str, capsys) -> list[str]:
    """The sentences with which `show` refuses a setting."""
    assert cli.main(["show", "--preset", "digits", setting]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[1:]


def value_with_an_effect(key: str):
    return next(value for value in (True, False, 2) if not has_no_effect(key, value))


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_supported_is_refused_with_the_reason_and_the_remedy(key, tmp_path, capsys):
    value = value_with_an_effect(key)
    (sentence,) = refused_by_show(written(tmp_path, nested(key, value)), capsys)
    assert f"own.json': the file's {key} = {value!r} is not supported: {REFUSED[key].reason}; " in sentence
    assert sentence.endswith(f"; {REFUSED[key].remedy}")


@pytest.mark.parametrize("key", OURS)
def test_a_key_that_the_configuration_sets_is_refused_with_the_option(key, tmp_path, capsys):
    (sentence,) = refused_by_show(written(tmp_path, {key: 8}), capsys)
    assert f"remove it and set {OURS[key]}" in sentence
    options = [word for word in OURS[key].replace(",", " ").split() if "." in word.strip(".")]
    for option in options:
        section, _, name = option.partition(".")
        assert hasattr(getattr(resolve("digits"), section), name)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("zero_optimisation", "zero_optimization"),
        ("steps_per_prnt", "steps_per_print"),
        ("bf61", "bf16"),
        ("bf16.enable", "enabled"),
        ("zero_optimization.overlap_com", "overlap_comm"),
        ("zero_optimization.reduce_bucket", "reduce_bucket_size"),
        ("zero_optimization.offload_optimizer.devise", "device"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_spelling(key, nearest, tmp_path, capsys):
    (sentence,) = refused_by_show(written(tmp_path, nested(key, True)), capsys)
    assert f"{key} = True is refused: {key.rpartition('.')[2]!r} is not a key of" in sentence
    assert "did you mean" in sentence and nearest in sentence


@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("zero_optimization.overlap_comm", "true", "must be true or false"),
        ("zero_optimization.reduce_bucket_size", "auto", "must be a whole number, 1 or more; without the key"),
        ("zero_optimization.reduce_bucket_size", 0, "must be a whole number, 1 or more"),
        ("zero_optimization.reduce_bucket_size", 0.5, "must be a whole number"),
        ("zero_optimization.stage", "2", "must be 0, 1, 2 or 3"),
        ("zero_optimization.offload_optimizer", "cpu", "must be an object"),
        ("zero_optimization.offload_optimizer.device", "nvme", "must be none or cpu"),
        ("steps_per_print", 0, "must be a whole number, 1 or more"),
        ("data_types.grad_accum_dtype", "fp16", "must be fp32 or bf16"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule(key, value, rule, tmp_path, capsys):
    (sentence,) = refused_by_show(written(tmp_path, nested(key, value)), capsys)
    assert key in sentence and rule in sentence


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, "must be true at stage 1"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "not supported at stage 0"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "not supported at stage 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_force_ds_cpu_optimizer must be false",
        ),
    ],
)
def test_combinations_that_do_not_train_are_refused(content, reason, tmp_path, capsys):
    (sentence,) = refused_by_show(written(tmp_path, content), capsys)
    assert reason in sentence


@pytest.mark.parametrize(
    "content, left",
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, {"stage": 2}),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}}},
            {"stage": 3},
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, {"stage": 2}),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, {"stage": 2}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, {"stage": 3}),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}, {"stage": 3}),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, {"reduce_bucket_size": 500_000_000}),
        ({"zero_optimization": {}, "wandb": {"enabled": False, "project": "x"}, "gradient_predivide_factor": 1.0}, {}),
        (
            {
                "zero_optimization": {},
                "fp16": {"enabled": False, "loss_scale": 0},
                "torch_autocast": {"enabled": False},
            },
            {},
        ),
        ({"zero_optimization": {}, "activation_checkpointing": {"cpu_checkpointing": False}}, {}),
    ],
)
def test_deepspeed_values_without_effect_are_left_out(content, left, tmp_path, capsys):
    """Such values stand in many files that are copied around; every reader then sees the same."""
    setting = written(tmp_path, content)
    read = load_deepspeed(resolve("digits", overrides=[setting]))
    assert read == {"zero_optimization": left} and type(read["zero_optimization"].get("reduce_bucket_size", 1)) is int
    assert cli.main(["show", "--preset", "digits", setting]) == 0
    assert "states on the fullest rank" in capsys.readouterr().out


def test_everything_wrong_with_the_file_is_in_the_message_of_every_command(tmp_path, capsys, monkeypatch):
    """Before a process group exists, together with what else is wrong with the configuration."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("python"))
    monkeypatch.setattr(runtime, "init_process_group", lambda *_: pytest.fail("a process group was made"))
    wrong = [nested("zero_optimization.zero_hpz_partition_size", 2), {"torch_autocast": {"enabled": True}}]
    wrong += [{"amp": {"enabled": False}}, nested("zero_optimization.mics_shard_size", 4), {"train_batch_size": 4}]
    content = merged(*wrong, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 0}, "gradient_cliping": 1.0})
    setting = written(tmp_path, content)
    messages = []
    for command in (
        ["show"],
        ["train", "--run-dir", str(tmp_path / "run"), "--dry-run"],
        ["train", "--run-dir", str(tmp_path)],
    ):
        assert cli.main([*command, "--preset", "digits", setting, "train.lr=-1"]) == 2
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1] == messages[2]
    assert messages[0].startswith("megapromoe: 8 problems in the configuration") and messages[0].count("\n  - ") == 8
    for word in ("hpz", "torch_autocast", "'amp'", "mics_shard", "train_batch_size", "gradient_clip", "stage 0", "lr"):
        assert word in messages[0]
    assert not (tmp_path / "run").exists()


def test_no_key_stands_in_two_tables():
    assert not (SUPPORTED.keys() & REFUSED.keys() | SUPPORTED.keys() & OURS.keys() | REFUSED.keys() & OURS.keys())
    assert set(names_in("bf16")) >= {"enabled", "check_grad_overflow"} and "enabled" not in names_in("")
