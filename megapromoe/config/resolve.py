"""The configuration of a run: read in layers, and checked as a whole before anything is started.

A `Config` is layered from a preset, a YAML file and `section.key=value` arguments. One `ConfigError` lists everything
that is wrong with it: unknown keys, wrong types, values out of range, combinations that cannot run. This module imports
no torch, so that mistakes are reported immediately, also on a machine without torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from megapromoe.config import class_groups, extensions
from megapromoe.config.data_options import NO_DATA, UNSET
from megapromoe.config.deepspeed_file import read_deepspeed
from megapromoe.config.options import Config, ConfigError, Rule, sentences, to_dict, world_rules
from megapromoe.config.presets import PRESETS
from megapromoe.config.reader import (
    TypedText,
    as_kind,
    kind_of,
    kind_rule,
    range_rule,
    suggest,
    unknown_key,
)
from megapromoe.config.renamed_options import present_layer
from megapromoe.config.rules import rules
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml

SHORTEST_WARMUPS = 10  # training has at least this many times the steps of a preset's warm-up


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    world: int | None = None,
    run_warmup: int | None = None,
    saved: Iterable[str] = (),
    file_is_saved: bool = False,
) -> Config:
    """The checked config of defaults <- preset <- YAML file <- `section.key=value` overrides.

    Former spellings of options (`renamed_options.py`) are accepted, with a notice for those that a user wrote.

    A preset's warm-up suits the preset's number of steps, so it is limited to a tenth of `train.steps`. A warm-up that
    the file or an override sets is used unchanged.

    Args:
        preset: a name in `presets.PRESETS`.
        file: YAML of sections, each a mapping of keys to values.
        overrides: arguments such as "model.depth=4".
        world: number of ranks; None leaves out the rules on ranks.
        run_warmup: `train.warmup` of the run that is continued, in place of the preset's.
        saved: like `overrides`, below them: settings of a config that the program saved in another form than a file.
        file_is_saved: whether the program wrote the file; then its former spellings give no notice.

    Raises ConfigError, listing everything that is wrong.
    """
    problems: list[str] = []
    clashes: list[str] = []  # options set by both spellings; no setting is missing because of these
    settings: list[tuple[str, Any, str]] = []  # dotted key, value, origin

    def add(layer: Iterable[tuple[str, Any]], origin: str, is_saved: bool = False) -> None:
        settings.extend((key, value, origin) for key, value in present_layer(layer, origin, clashes, is_saved))

    if preset is not None and preset not in PRESETS:
        problems.append(f"preset = {preset!r}: is not a preset; {suggest(preset, PRESETS)}")
    elif preset is not None:
        origin = f"preset {preset}"
        add(_flatten(PRESETS[preset], origin, problems), origin)
    if file is not None:
        add(_flatten(_read_yaml(Path(file), problems), str(file), problems), str(file), file_is_saved)
    # Rules on refused fields are not checked. If a whole layer is missing, all fields that are not set elsewhere
    # count as refused.
    refused: set[str] = set()
    if problems:
        refused = {f"{section}.{name}" for section, values in to_dict(Config()).items() for name in values}
    add(_parse(saved, "saved config", problems), "saved config", is_saved=True)
    add(_parse(overrides, "command line", problems), "command line")
    problems += clashes

    sections = {f.name: getattr(Config(), f.name) for f in fields(Config)}
    origins: dict[str, str] = {}
    changed: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, value, origin in settings:
        section, _, name = key.partition(".")
        if problem := _unknown(section, name, sections):
            problems.append(f"{key} = {value!r} ({origin}): {problem}")
            continue
        kind = kind_of(sections[section].__dataclass_fields__[name])
        typed = as_kind(value, kind)
        if typed is None:
            refused.add(key)
            problems.append(f"{key} = {value!r} ({origin}): {kind_rule(value, kind)}")
        else:
            refused.discard(key)
            changed[section][name] = typed
            origins[key] = origin
    sections = {section: replace(values, **changed[section]) for section, values in sections.items()}
    if origins.get("train.warmup") == f"preset {preset}" and "train.steps" not in refused:
        train = sections["train"]
        warmup = min(train.warmup, train.steps // SHORTEST_WARMUPS) if run_warmup is None else run_warmup
        sections["train"] = replace(train, warmup=warmup)
    config = _with_extensions(Config(**sections), problems, refused)
    config = _with_superclasses(config, problems, refused)
    problems += _violations(config, world, refused)
    if problems:
        raise ConfigError(problems)
    return config


def check(config: Config, world: int | None = None) -> None:
    """Raise ConfigError, listing everything, unless `config` can run (over `world` ranks, where given)."""
    if problems := _violations(config, world, set()):
        raise ConfigError(problems)


def typed_value(key: str, value: Any) -> Any:
    """The value of a setting, converted to the kind of its field: a number written as text becomes a number.

    A value that is not text, that its field cannot have, or whose key is unknown is returned unchanged.
    """
    section, _, name = key.partition(".")
    known = {f.name: f for f in fields(getattr(Config(), section))} if section in vars(Config()) else {}
    if not isinstance(value, str) or name not in known:
        return value
    typed = as_kind(TypedText(value), kind_of(known[name]))
    return value if typed is None else typed


def check_trainable(config: Config) -> None:
    """Raise ConfigError if `data.source` is unset, as it is in the presets of large models."""
    if config.data.source == UNSET:
        raise ConfigError([f"data.source = {UNSET!r}: {NO_DATA}"])


def to_yaml(config: Config) -> str:
    """YAML that `resolve(file=...)` reads back to an equal config."""
    return yaml.dump(to_dict(config), Dumper=yaml.CSafeDumper, sort_keys=False)


# ---- reading the layers


def _with_extensions(config: Config, problems: list[str], refused: set[str]) -> Config:
    """The config in which the names of users' code have absolute paths and versions, see `extensions`."""
    for point in (extensions.ROUTER, extensions.SAMPLER):
        section, _, name = point.option.partition(".")
        values = getattr(config, section)
        value = getattr(values, name)
        built_in = values.__dataclass_fields__[name].metadata["choices"]
        if value in built_in or point.option in refused or not point.accepts(value):
            continue
        try:
            config = replace(config, **{section: replace(values, **{name: point.recorded(value)})})
        except extensions.ExtensionError as error:
            problems.append(str(error))
            refused.add(point.option)
    return config


def _with_superclasses(config: Config, problems: list[str], refused: set[str]) -> Config:
    """The config with `model.superclasses` read from its file, so that a run does not depend on the file later."""
    model = config.model
    if model.router != "classification" or not class_groups.is_file(model.superclasses):
        return config
    if refused & {"model.superclasses", "model.num_classes", "model.router"}:
        return config
    try:
        text = class_groups.superclasses_in(Path(model.superclasses), model.num_classes)
    except class_groups.ClassGroupError as error:
        problems += [f"model.superclasses = {model.superclasses!r}: {problem}" for problem in error.violations]
        refused.add("model.superclasses")
        return config
    return replace(config, model=replace(model, superclasses=text))


def _read_yaml(path: Path, problems: list[str]) -> Mapping:
    try:
        content = read_yaml(path)
    except UnreadableFile as error:
        problems.append(f"file = {path}: {error}; give the path of a YAML file")
        return {}
    if content is None or isinstance(content, Mapping):  # an empty file sets nothing
        return content or {}
    problems.append(f"file = {path}: must be a mapping of sections, not a {type(content).__name__}")
    return {}


def _flatten(nested: Mapping, origin: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for section, values in nested.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        elif problem := _unknown(str(section), None, vars(Config())):
            problems.append(f"{section} = {values!r} ({origin}): {problem}")
        else:
            problems.append(f"{section} = {values!r} ({origin}): must be a mapping of keys to values")


def _parse(words: Iterable[str], origin: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for text in words:
        key, equals, value = text.partition("=")
        if equals:
            yield key.strip(), TypedText(value.strip())
        else:
            problems.append(f"{text!r} ({origin}): must be section.key=value")


def _unknown(section: str, name: str | None, sections: Mapping[str, Any]) -> str | None:
    if section not in sections:
        return f"{section!r} is not a section; {suggest(section, sections)}"
    if name is None:
        return None
    return unknown_key(name, [f.name for f in fields(sections[section])], section)


# ---- checking


def _violations(config: Config, world: int | None, refused: set[str]) -> list[str]:
    """A sentence for everything wrong with `config`, without rules that concern a `refused` field."""
    wrong: list[Rule] = []
    safe, defaults = config, Config()
    for section in fields(Config):
        values = given = getattr(config, section.name)
        for f in fields(values):
            key, value = f"{section.name}.{f.name}", getattr(values, f.name)
            kind = kind_of(f)
            rule = kind_rule(value, kind) if as_kind(value, kind) is None else range_rule(value, f.metadata)
            if rule:
                wrong.append(((key,), rule))
            if rule or key in refused:  # with the default value the rules below can be computed
                values = replace(values, **{f.name: getattr(getattr(defaults, section.name), f.name)})
        if values is not given:
            safe = replace(safe, **{section.name: values})
    problems = sentences(config, wrong, refused)
    refused = refused | {keys[0] for keys, _ in wrong}
    broken = [*rules(safe), *(() if world is None else world_rules(safe, world))]
    problems += sentences(safe, broken, refused)
    return problems if "train.deepspeed" in refused else problems + read_deepspeed(safe)[1]
