"""Options whose names have changed, and how their former spellings are read.

In what a user writes (`section.key=value`, YAML files, recipes of studies), a former spelling is accepted for one
release, with a notice that names the present one. In what the program wrote itself (config.yaml of a run, manifests,
study.yaml), it is accepted without a notice, for as long as such files are read.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from megapromoe.config.strict_yaml import UnreadableFile, parse_yaml

logger = logging.getLogger(__name__)

RENAMED: dict[str, str] = {  # former dotted name -> present one
    "model.gate": "model.score_function",
    "model.capacity_weight": "model.capacity_predictor_weight",
    "model.capacity_decay": "model.threshold_decay",
    "data.label_drop": "data.condition_dropout",
    "data.max_bad": "data.max_damaged",
    "train.clip": "train.max_grad_norm",
    "train.ema": "train.ema_decay",
    "train.keep": "train.keep_last",
    "train.spike": "train.spike_factor",
}
# Dotted name -> former value -> the settings that it stands for. The name itself is still that of an option.
RENAMED_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "train.optimizer": {
        backend: {"train.optimizer": "adamw", "train.adamw_backend": backend}
        for backend in ("torch", "apex", "deepspeed")
    },
    "model.qk_norm": {"false": {"model.qk_norm": "none"}, "true": {"model.qk_norm": "layer"}},
}


def is_former(key: str, value: Any) -> bool:
    """Whether a setting has a former name, or a former value of a present name."""
    return key in RENAMED or (key in RENAMED_VALUES and _spelling(value) in RENAMED_VALUES[key])


def present_settings(key: str, value: Any) -> dict[str, Any]:
    """What a setting means, by present names; a setting that is not former is returned unchanged."""
    if not is_former(key, value):
        return {key: value}
    return {RENAMED[key]: value} if key in RENAMED else dict(RENAMED_VALUES[key][_spelling(value)])


def present_layer(
    layer: Iterable[tuple[str, Any]], origin: str, problems: list[str], saved: bool = False
) -> list[tuple[str, Any]]:
    """The settings of one layer by present names, in their order.

    Args:
        layer: dotted names with their values.
        origin: name of the layer, such as "command line", for sentences.
        problems: receives a sentence for each option that the layer sets by its former and by its present spelling.
        saved: whether the program wrote the layer; then no notice is logged, and the present spelling has precedence.
    """
    settings = list(layer)
    given = {key for key, value in settings if not is_former(key, value)}
    result: list[tuple[str, Any]] = []
    for key, value in settings:
        present = present_settings(key, value)
        if not is_former(key, value):
            result.append((key, value))
        elif clashes := [name for name in present if name in given and name != key]:
            if not saved:
                problems.append(
                    f"{key} = {value!r} ({origin}): is the former spelling of {_words(key, present)}, and"
                    f" {', '.join(clashes)} is given as well; remove {key}"
                )
        else:
            if not saved:
                _notify(key, value, present)
            result.extend(present.items())
    return result


def present_sections(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of a config that the program wrote, by present names; a present spelling has precedence."""
    result = {section: dict(values) for section, values in sections.items()}
    for section, values in sections.items():
        for name, value in values.items():
            if is_former(key := f"{section}.{name}", value):
                del result[section][name]
                for present, present_value in present_settings(key, value).items():
                    present_section, _, present_name = present.partition(".")
                    result.setdefault(present_section, {}).setdefault(present_name, present_value)
    return result


def present_names(names: Iterable[str], saved: bool = False) -> list[str]:
    """Dotted names without values, such as those of `--allow` and of a recipe's `without`, as present names."""
    names = list(names)
    for name in names:
        if name in RENAMED and not saved:
            _notify(name, None, {RENAMED[name]: None})
    return [RENAMED.get(name, name) for name in names]


def present_words(words: Iterable[str]) -> list[str]:
    """Words `section.key=value` by present names, without a notice; the resolved config has given it."""
    result = []
    for word in words:
        key, equals, value = word.partition("=")
        key, value = key.strip(), value.strip()
        former = equals and is_former(key, value)
        result += [f"{name}={v}" for name, v in present_settings(key, value).items()] if former else [word]
    return result


def _spelling(value: Any) -> str:
    """A value as `RENAMED_VALUES` writes it; all spellings of true and false in YAML are "true" and "false"."""
    if isinstance(value, str):
        with suppress(UnreadableFile):
            parsed = parse_yaml(value)
            value = parsed if isinstance(parsed, bool) else value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(key: str, present: Mapping[str, Any]) -> str:
    """The present spelling: the name if only that has changed, else settings."""
    return RENAMED[key] if key in RENAMED else " ".join(f"{name}={value}" for name, value in present.items())


def _notify(key: str, value: Any, present: Mapping[str, Any]) -> None:
    _log_once(key if key in RENAMED else f"{key}={_spelling(value)}", _words(key, present))


@cache
def _log_once(former: str, present: str) -> None:
    """Logs the notice, once in a process: a command may resolve its settings several times."""
    logger.warning("%s: is now spelled %s; the next release refuses the former spelling", former, present)
