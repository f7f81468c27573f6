"""Reads the JSON file of DeepSpeed options that `train.deepspeed` names, without importing DeepSpeed."""

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from megapromoe.config.deepspeed_keys import OFFLOAD, OURS, REFUSED, SUPPORTED, ZERO, Key, has_no_effect, names_in
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.reader import suggest


@cache
def find_ds_configs() -> Path:
    """The folder of DeepSpeed's JSON files: inside the package if it is installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_deepspeed(config: Config) -> dict[str, Any]:
    """The content of the file that `train.deepspeed` names, as a dict of DeepSpeed's keys. Raises ConfigError."""
    content, problems = read_deepspeed(config)
    if problems:
        raise ConfigError(problems)
    return content


def read_deepspeed(config: Config) -> tuple[dict[str, Any], list[str]]:
    """The content of the file that `train.deepspeed` names, and a sentence for each problem.

    Keys whose values have no effect are left out, and whole floats become ints, so that equal settings compare equal.
    """
    name = config.train.deepspeed
    path = Path(name) if name.endswith(".json") else find_ds_configs() / f"{name}.json"
    try:
        content, wrong = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(p.stem for p in find_ds_configs().glob("*.json"))
        reason = f"cannot be read ({error.strerror}: {path}); {suggest(name, known)}"
        return {}, [f"train.deepspeed = {name!r}: {reason}"]
    except ValueError as error:  # also undecodable text and what the two hooks refuse
        return {}, [f"train.deepspeed = {name!r}: {path} is not strict JSON: {error}"]
    if not isinstance(content, dict):
        return {}, [f"train.deepspeed = {name!r}: the file must hold an object, not a {type(content).__name__}"]
    content = deepcopy(content)
    problems = [f"train.deepspeed = {name!r}: the file's {problem}" for problem in wrong]
    if not problems and config.train.compile and content.get(ZERO, {}).get("stage") == 3:
        rule = (
            f"must be false with train.deepspeed = {name!r}, ZeRO stage 3: a layer's parameters are not gathered when"
        )
        problems.append(f"train.compile = True: {rule} it is compiled; use stage 2 or less")
    if not problems and content.get(ZERO, {}).get("stage") == 3 and config.may_have_replicas:
        problems.append(
            f"train.deepspeed = {name!r}: must not be ZeRO stage 3 with copies of experts ({config.copies_in_words}):"
            " their weights are sent before a rank has gathered those of its own experts; use stage 2 or less, where"
            " ep divides the experts already"
        )
    if not problems and config.train.adamw_backend == "fused":
        problems += _fused_update(name, content.get(ZERO, {}))
    if not problems and config.train.gradient_reduction == "reduce_scatter":
        problems += _reduce_scatter(name, content.get(ZERO, {}))
    if not problems and config.parallel.shard_ranks:
        problems += _shards_of_some_ranks(config, content.get(ZERO, {}))
    if not problems and config.train.optimizer == "muon" and "offload_optimizer" in content.get(ZERO, {}):
        problems.append(
            f"train.optimizer = 'muon': is not supported with train.deepspeed = {name!r}, which offloads the optimizer"
            " to the host, too slow for its products of matrices; use a file without offload_optimizer, or"
            " train.optimizer=adamw"
        )
    return content, problems


def _fused_update(name: str, zero: dict[str, Any]) -> Iterator[str]:
    """Why the fused update is not possible with a file's block `zero_optimization`, in a sentence."""
    subject = f"train.adamw_backend = 'fused': is not supported with train.deepspeed = {name!r}"
    if zero.get("stage", 0) == 0:
        yield (
            f"{subject}, ZeRO stage 0, which has no flat weights that one pass can update; use stage 1, which costs"
            " nothing more on one data-parallel rank, or train.adamw_backend=torch"
        )
    elif "offload_optimizer" in zero:
        yield f"{subject}, which offloads the optimizer to the host; use train.adamw_backend=torch"


def _reduce_scatter(name: str, zero: dict[str, Any]) -> Iterator[str]:
    """Why gradients cannot be reduce-scattered with a file's block `zero_optimization`, in a sentence."""
    subject = f"train.gradient_reduction = 'reduce_scatter': is not supported with train.deepspeed = {name!r}"
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        why = "which shards no gradients or states" if stage == 0 else "which always reduce-scatters gradients"
        yield f"{subject}, ZeRO stage {stage}, {why}; use stage 1 or 2, or train.gradient_reduction=auto"
    elif "offload_optimizer" in zero:
        yield (
            f"{subject}, which offloads the optimizer: DeepSpeed then copies gradients to the host as it reduces them;"
            " use train.gradient_reduction=auto"
        )


def _shards_of_some_ranks(config: Config, zero: dict[str, Any]) -> Iterator[str]:
    """Why states cannot be divided over some of the ranks with a file's block `zero_optimization`, in a sentence."""
    train, stage = config.train, zero.get("stage", 0)
    subject = f"parallel.shard_ranks = {config.parallel.shard_ranks}: is not supported with"
    if stage not in (1, 2):
        why = "which divides no states" if stage == 0 else "which divides the parameters over all ranks"
        yield (
            f"{subject} train.deepspeed = {train.deepspeed!r}, ZeRO stage {stage}, {why}; use stage 1 or 2, or"
            " parallel.shard_ranks=0"
        )
    elif "offload_optimizer" in zero:
        yield (
            f"{subject} train.deepspeed = {train.deepspeed!r}, which offloads the optimizer; use a file without"
            " offload_optimizer, or parallel.shard_ranks=0"
        )
    elif train.gradient_reduction == "all_reduce" or (train.gradient_reduction, train.optimizer) == ("auto", "muon"):
        muon = " and train.optimizer = 'muon'" if train.gradient_reduction == "auto" else ""
        yield (
            f"{subject} train.gradient_reduction = {train.gradient_reduction!r}{muon}, where DeepSpeed sums gradients"
            " over all ranks; use train.gradient_reduction=reduce_scatter, or parallel.shard_ranks=0"
        )


@lru_cache(maxsize=64)  # planning reads the same files for hundreds of layouts
def _parse(text: str) -> tuple[Any, tuple[str, ...]]:
    """The content of a file, and its problems; raises ValueError if it is not strict JSON."""
    content = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if not isinstance(content, dict):
        return content, ()
    wrong: list[str] = []
    content = _read_block("", content, wrong)
    wrong += _combinations(content)
    return content, tuple(wrong)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _read_block(block: str, content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The valid keys of a block that have an effect; a sentence for each invalid one is appended to `problems`.

    Args:
        block: dotted name of the block, "" for the top of the file.
    """
    values: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{block}.{name}" if block else name
        shown = repr(key) if isinstance(value, (dict, list)) else f"{key} = {value!r}"
        if key in SUPPORTED:
            kind = SUPPORTED[key].kind
            if kind is dict and isinstance(value, dict):
                values[name] = _read_block(key, value, problems)
            elif rule := _value_rule(value, SUPPORTED[key]):
                problems.append(f"{repr(key) if kind is dict else shown} must be {rule}")
            elif value is not None:
                values[name] = int(value) if kind is int else value
        elif key in OURS:
            problems.append(f"{key!r} is set by the run's configuration; remove it and set {OURS[key]}")
        elif key not in REFUSED:
            where = f"of {block!r}" if block else "of DeepSpeed's"
            problems.append(f"{shown} is refused: {name!r} is not a key {where}; {suggest(name, names_in(block))}")
        elif not has_no_effect(key, value):
            problems.append(f"{shown} is not supported: {REFUSED[key].reason}; {REFUSED[key].remedy}")
    if block == ZERO and values.get("offload_optimizer", {}).get("device", "none") == "none":  # DeepSpeed's default
        values.pop("offload_optimizer", None)
    return values


def _value_rule(value: Any, expected: Key) -> str | None:
    """The rule that a value of a supported key violates, to follow "must be"; None if it violates none."""
    if value is None and expected.optional:
        return None
    if expected.kind is dict:
        return "an object such as {'enabled': true} or {'stage': 1}"
    if expected.kind is bool:
        return None if type(value) is bool else "true or false"
    if expected.choices:
        valid = type(value) is expected.kind and value in expected.choices
        *first, last = map(str, expected.choices)
        return None if valid else f"{', '.join(first)} or {last}"
    if expected.kind is str:
        return None if type(value) is str else "text"
    is_whole = type(value) is int or (type(value) is float and value.is_integer())
    if is_whole and value >= expected.low:
        return None
    return f"a whole number, {expected.low} or more; without the key DeepSpeed takes its default"


def _combinations(content: dict[str, Any]) -> Iterator[str]:
    """A sentence for each combination of supported keys that fails or computes wrong gradients."""
    zero = content.get(ZERO, {})
    stage, bf16 = zero.get("stage", 0), content.get("bf16", {}).get("enabled", False)
    # At stage 1 without contiguous gradients DeepSpeed 0.19.8 computes wrong gradients over several micro-batches.
    for key, stages in (("reduce_scatter", (1, 2, 3)), ("contiguous_gradients", (1, 2))):
        if stage in stages and zero.get(key, True) is not True:
            yield f"{ZERO}.{key} must be true at stage {stage}: experts need it"
    if bf16 and stage == 0:
        yield (
            f"'bf16' is not supported with {ZERO}.stage 0: DeepSpeed leaves experts out of its fp32 masters' norm"
            " there; use stage 1, which costs nothing more on one data-parallel rank"
        )
    if bf16 and stage == 1 and content.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        yield (
            "data_types.grad_accum_dtype = 'fp32' is not supported with 'bf16' at stage 1, because DeepSpeed then uses"
            " another optimizer; use stage 2"
        )
    if "offload_optimizer" in zero:
        if stage == 3:
            yield (
                f"{OFFLOAD} is not supported at stage 3: its gradient norm cannot be corrected;"
                " use stage 2 with offload_optimizer"
            )
        if stage == 0:
            yield f"{OFFLOAD} is not supported at stage 0, which has no optimizer states to offload; use stage 1 or 2"
        if stage in (1, 2) and content.get("zero_force_ds_cpu_optimizer", True):
            yield (
                f"zero_force_ds_cpu_optimizer must be false with {OFFLOAD}: the optimizer is that of"
                " train.adamw_backend; set it to false"
            )
