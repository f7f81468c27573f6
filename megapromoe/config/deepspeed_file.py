"""The JSON file of DeepSpeed's own options that `train.deepspeed` names. Read without importing DeepSpeed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config, ConfigError
from megapromoe.config.reader import suggest

_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer, train.lr, ...",
    "scheduler": "train.schedule, train.warmup, ...",
    "expert_parallel": "parallel.ep",
    "tensor_parallel": "parallel.tp",
}


def find_ds_configs() -> Path:
    """The folder of DeepSpeed's JSON files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_deepspeed(config: Config) -> dict[str, Any]:
    """The JSON that `train.deepspeed` names, as a dict of DeepSpeed's own keys; raises ConfigError."""
    content, problems = read_deepspeed(config)
    if problems:
        raise ConfigError(problems)
    return content


def read_deepspeed(config: Config) -> tuple[dict[str, Any], list[str]]:
    """What the file of `train.deepspeed` holds, and a sentence for each thing that is wrong with it."""
    name = config.train.deepspeed
    path = Path(name) if name.endswith(".json") else find_ds_configs() / f"{name}.json"
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except OSError as error:
        known = sorted(p.stem for p in find_ds_configs().glob("*.json"))
        reason = f"cannot be read ({error.strerror}: {path}); {suggest(name, known)}"
        return {}, [f"train.deepspeed = {name!r}: {reason}"]
    except ValueError as error:  # also undecodable text and what the two hooks refuse
        return {}, [f"train.deepspeed = {name!r}: {path} is not strict JSON: {error}"]
    problems = [f"train.deepspeed = {name!r}: {problem}" for problem in _deepspeed_rules(content)]
    if not problems and config.train.compile and content.get("zero_optimization", {}).get("stage") == 3:
        rule = f"must be false with train.deepspeed = {name!r}, ZeRO stage 3: a layer's parameters are not there when"
        problems.append(f"train.compile = True: {rule} it is compiled; use stage 2 or less")
    return content, problems


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _deepspeed_rules(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"the file must hold an object, not a {type(content).__name__}"
        return
    for key in (key for key in content if key in _OURS):
        yield f"the file's {key!r} is not DeepSpeed's to set here; remove it and set {_OURS[key]}"
    for precision in ("fp16", "bf16"):
        block = content.get(precision, {})
        if not isinstance(block, dict) or type(block.get("enabled", False)) is not bool:
            yield f"the file's {precision!r} must be an object such as {{'enabled': true}}"
        elif precision == "fp16" and block.get("enabled"):
            yield "the file's 'fp16' is not supported, nor is its loss scaling; use bf16, or neither for fp32"
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield "the file's 'zero_optimization' must be an object such as {'stage': 1}"
        return
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"the file's zero_optimization.stage = {stage!r} must be 0, 1, 2 or 3"
        return
    for key, stages in (("reduce_scatter", (1, 2, 3)), ("contiguous_gradients", (2,))):
        if stage in stages and zero.get(key, True) is not True:
            yield f"the file's zero_optimization.{key} must be true at stage {stage}: experts need it"
    yield from _stage_rules(content, zero, stage)


def _stage_rules(content: dict[str, Any], zero: dict[str, Any], stage: int) -> Iterator[str]:
    """Combinations that DeepSpeed accepts and that train wrongly, or along a path that is not supported."""
    block = content.get("bf16", {})
    bf16 = isinstance(block, dict) and block.get("enabled") is True
    if bf16 and stage == 0:
        yield (
            "the file's 'bf16' is not supported with zero_optimization.stage 0: DeepSpeed leaves experts out of its"
            " fp32 masters' norm there; use stage 1, which costs nothing more on one data-parallel rank"
        )
    types = content.get("data_types", {})
    if not isinstance(types, dict):
        yield "the file's 'data_types' must be an object such as {'grad_accum_dtype': 'bf16'}"
    elif bf16 and stage == 1 and types.get("grad_accum_dtype") == "fp32":
        yield (
            "the file's data_types.grad_accum_dtype = 'fp32' is not supported with 'bf16' at stage 1, where it takes"
            " another optimizer path; use stage 2"
        )
    if stage == 3 and (zero.get("offload_optimizer") or zero.get("offload_param")):
        yield (
            "the file's offload is not supported at stage 3: its gradient norm cannot be put right;"
            " use stage 2 with offload_optimizer"
        )
