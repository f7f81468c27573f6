"""The configuration of a run: frozen, typed, and checked as a whole before anything is started.

A `Config` is layered from a preset, a YAML file and `section.key=value` arguments. All that is wrong with it
(unknown keys, wrong types, values out of range, combinations that cannot run) is told in one `ConfigError`.
This module imports no torch, so that a mistake is reported at once and on a machine without one.

Its length comes from the table of options and the table of rules; both are easiest to read in one piece.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megapromoe import classes
from megapromoe.presets import PRESETS

ONE_UP, ZERO_UP, POSITIVE = "[1, inf)", "[0, inf)", "(0, inf)"
ROUTERS = ("dense", "promoe", "promoe_ec", "promoe_linear", "classification", "kmeans", "tc", "ec", "diffmoe")
PROMOE_ROUTERS = ("promoe", "promoe_ec")  # with prototypes
GATE_ROUTERS = ("promoe_linear", "tc", "ec", "diffmoe")  # a linear gate
GUIDED_ROUTERS = ("classification", "kmeans")
# Null images apart, a shared expert beside the routed ones.
TWO_STEP_ROUTERS = (*PROMOE_ROUTERS, "promoe_linear", *GUIDED_ROUTERS)
PUBLISHED_ROUTERS = ("dense", *PROMOE_ROUTERS, "tc", "ec", "diffmoe")
EXPERT_CHOICE_ROUTERS = ("promoe_ec", "ec", "diffmoe")
SOURCES = ("digits", "fashion_mnist", "latents", "synthetic")
FIXED_SIZES = {"digits": 8, "fashion_mnist": 32}  # sources of one size, all of 1 channel and 10 classes


class ConfigError(ValueError):
    """A configuration that cannot run; `violations` lists every reason, the message holds them all."""

    def __init__(self, violations: Iterable[str]):
        self.violations = tuple(violations)
        count = "1 problem" if len(self.violations) == 1 else f"{len(self.violations)} problems"
        super().__init__("\n  - ".join([f"{count} in the configuration:", *self.violations]))


def option(default: Any, help: str, choices: tuple[str, ...] = (), within: str = "") -> Any:
    """A config field: default, line of help, and the valid `choices` or interval, such as "[0, 1)"."""
    return field(default=default, metadata={"help": help, "choices": choices, "within": within})


@dataclass(frozen=True)
class ModelConfig:
    """The network: DiT's sizes, the router and the experts."""

    router: str = option(
        "promoe", "who routes: dense DiT, ProMoE and its variants, classes or k-means, TC, EC, DiffMoE", ROUTERS
    )
    hidden_size: int = option(384, "channels D of a token", within=ONE_UP)
    depth: int = option(12, "transformer blocks L", within=ONE_UP)
    heads: int = option(6, "attention heads", within=ONE_UP)
    patch_size: int = option(2, "side of a patch, in pixels of the input", within=ONE_UP)
    input_size: int = option(32, "side of the input, in pixels (of latents, where it is latents)", within=ONE_UP)
    in_channels: int = option(4, "channels C of the input", within=ONE_UP)
    num_classes: int = option(1000, "classes; the null class is the one after the last", within=ONE_UP)
    mlp_ratio: float = option(4.0, "width of a dense MLP over hidden_size", within=POSITIVE)
    qk_norm: bool = option(False, "LayerNorm on the queries and keys of each head")
    learn_sigma: bool = option(True, "double the output channels (DDPM's learned variance)")
    num_experts: int = option(12, "routed experts E of an MoE block", within=ONE_UP)
    # Of a token under token choice; under expert choice each expert takes int(S / E * top_k) tokens an image.
    top_k: int = option(1, "experts K of a token; by expert choice: of a token on average", within=ONE_UP)
    expert_ratio: float = option(2.0, "width F of an expert over hidden_size", within=POSITIVE)
    moe_every: int = option(2, "block i is MoE when (i+1) % moe_every == 0: 2 odd, 1 all", within=ONE_UP)
    shared_expert: bool = option(True, "ProMoE, guided: one expert that every token visits")
    unconditional_expert: bool = option(True, "ProMoE, guided: one expert for all tokens of null-class images")
    gate: str = option(
        "identity", "ProMoE, kmeans: an expert's weight from its score", ("identity", "sigmoid", "softmax")
    )
    rcl_weight: float = option(1.0, "ProMoE: weight of the routing contrastive loss (RCL)", within=ZERO_UP)
    rcl_temperature: float = option(0.07, "ProMoE: temperature of the RCL", within=POSITIVE)
    rcl_tokens: str = option("all", "RCL, top_k > 1: a token counts for all its experts or one", ("all", "first"))
    classification_weight: float = option(1.0, "classification: weight of the super-class loss", within=ZERO_UP)
    superclasses: str = option(
        classes.CONTIGUOUS, "classification: contiguous, modulo, a YAML or JSON file, or 0,0,1,... for each class"
    )
    kmeans_decay: float = option(0.9, "kmeans: decay of the running centroids; 0 as published", within="[0, 1)")
    capacity_factor: float = option(
        0.0, "room for the rows of an expert, over an even share; 0: for all rows, none is dropped", within=ZERO_UP
    )
    batch_scope: str = option("global", "batch statistics over all data ranks or one", ("global", "rank"))
    balance_weight: float = option(0.0, "weight of the balance loss; 0 turns it off", within=ZERO_UP)
    balance_form: str = option("batch", "balance over the batch or each image", ("batch", "sequence"))
    capacity_weight: float = option(0.01, "DiffMoE: weight of the capacity predictor's loss", within=ZERO_UP)
    capacity_decay: float = option(0.95, "DiffMoE: decay of the running thresholds", within="[0, 1)")

    @property
    def tokens(self) -> int:
        """Tokens S of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of a dense MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def expert_width(self) -> int:
        """Hidden width F of one expert."""
        return int(self.hidden_size * self.expert_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the raw output: C, or 2C with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    @property
    def expert_capacity(self) -> int:
        """Tokens an expert takes from one image under expert choice: int(S / E * top_k)."""
        return int(self.tokens / self.num_experts * self.top_k)

    @property
    def superclass_of(self) -> tuple[int, ...]:
        """The super-class, and so the expert, of each class under router=classification."""
        return classes.superclass_table(self.superclasses, self.num_classes, self.num_experts)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks whose MLP is an MoE, in order; none for the dense DiT."""
        if self.router == "dense":
            return ()
        return tuple(i for i in range(self.depth) if (i + 1) % self.moe_every == 0)


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies over the ranks."""

    tp: int = option(1, "tensor parallel: heads and MLP widths split over so many ranks", within=ONE_UP)
    ep: int = option(1, "expert parallel: routed experts split over so many ranks", within=ONE_UP)
    expert_tp: bool = option(False, "also split each routed expert's width over tp")
    recompute: str = option(
        "none",
        "activations made again in the backward pass: none, of MoE layers, of blocks but routers, all (least memory)",
        ("none", "moe", "blocks", "all"),
    )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = option("digits", "what to train on; latents: see docs/data.md", SOURCES)
    path: str = option("", "folder of the latents, or of fashion_mnist (empty: of its Debian package)")
    test_path: str = option("", "folder of latents of images that are not trained on, for evaluation")
    size: int = option(65536, "images of the synthetic source", within=ONE_UP)
    label_drop: float = option(0.1, "share of the labels replaced by the null class", within="[0, 1)")
    flip: bool = option(False, "mirror half of the images")
    seed: int = option(0, "seed of the stream: order, noise, time, flips, label drop", within=ZERO_UP)
    workers: int = option(1, "threads of a rank that make batches, and batches made ahead", within="[1, 256]")
    verify: bool = option(True, "latents: compare each record with its checksum when it is read")
    max_bad: int = option(
        100, "latents: damaged samples passed over, of all ranks, before the run ends", within=ZERO_UP
    )
    cache: str = option("", "latents: folder on a node's own disk to copy the shards to")


@dataclass(frozen=True)
class DiffusionConfig:
    """What is learnt: rectified flow or DDPM."""

    objective: str = option("rf", "rectified flow or DDPM", ("rf", "ddpm"))
    time: str = option("logit_normal", "rf: distribution of the time", ("logit_normal", "mode", "uniform"))
    logit_mean: float = option(0.0, "rf: mean of the logit of the time", within="(-inf, inf)")
    logit_std: float = option(1.0, "rf: standard deviation of the logit of the time", within=POSITIVE)
    # Past 2 / (pi - 2) or -1 the map from uniform to mode time is not monotonic (arXiv 2403.03206, 3.1).
    mode_scale: float = option(1.29, "rf: weight of the middle times in mode sampling", within="[-1, 1.7519]")
    shift: float = option(1.0, "rf: shift of the times towards noise; 1 is none", within=POSITIVE)


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn."""

    method: str = option("euler", "sampler", ("euler", "heun", "ddpm", "ddim"))
    steps: int = option(250, "steps of the sampler", within=ONE_UP)
    guidance: float = option(1.5, "classifier-free guidance scale; 1 is none", within=ZERO_UP)
    guidance_low: float = option(0.0, "lowest normalised time at which guidance acts", within="[0, 1]")
    guidance_high: float = option(1.0, "highest normalised time at which guidance acts", within="[0, 1]")
    batch: int = option(64, "images a rank draws at once", within=ONE_UP)
    seed: int = option(0, "seed of the images", within=ZERO_UP)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: int = option(500_000, "optimizer steps", within=ONE_UP)
    global_batch: int = option(256, "images of an optimizer step, over all ranks", within=ONE_UP)
    accumulation: int = option(1, "micro-batches of an optimizer step", within=ONE_UP)
    lr: float = option(1e-4, "peak learning rate", within=POSITIVE)
    beta1: float = option(0.9, "AdamW: decay of the first moment", within="[0, 1)")
    beta2: float = option(0.999, "AdamW: decay of the second moment", within="[0, 1)")
    eps: float = option(1e-8, "AdamW: epsilon", within=POSITIVE)
    weight_decay: float = option(0.0, "AdamW: weight decay", within=ZERO_UP)
    warmup: int = option(0, "steps of linear warm-up", within=ZERO_UP)
    schedule: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    min_lr: float = option(0.0, "learning rate at the end of the cosine", within=ZERO_UP)
    clip: float = option(0.5, "largest gradient norm; 0 turns clipping off", within=ZERO_UP)
    ema: float = option(0.9999, "decay of the averaged weights", within="[0, 1)")
    optimizer: str = option("torch", "whose fused AdamW", ("torch", "apex", "deepspeed"))
    deepspeed: str = option("bf16_zero1", "name of a file in ds_configs, or a path to a .json file")
    compile: bool = option(False, "torch.compile the dense layers; the first step then takes minutes")
    seed: int = option(0, "seed of the initial weights", within=ZERO_UP)
    timeout: float = option(600.0, "seconds before a hanging collective ends the run", within=POSITIVE)
    step_timeout: float = option(
        300.0, "seconds in one section of a step after which a hang is named and ends the run", within=POSITIVE
    )
    log_every: int = option(10, "steps between metrics", within=ONE_UP)
    save_every: int = option(5000, "steps between checkpoints; 0 saves only the last", within=ZERO_UP)
    keep: int = option(2, "newest checkpoints kept", within=ONE_UP)
    keep_every: int = option(0, "also keep checkpoints of steps that this divides; 0 keeps none", within=ZERO_UP)
    max_failed_saves: int = option(3, "failed saves in a row that end the run", within=ONE_UP)
    sample_every: int = option(0, "steps between sample grids; 0 draws none", within=ZERO_UP)
    max_bad_steps: int = option(3, "skipped updates in a row that end the run", within=ONE_UP)
    spike: float = option(
        0.0, "skip updates whose gradient norm exceeds this many recent medians; 0 skips none", within=ZERO_UP
    )


@dataclass(frozen=True)
class Layout:
    """The sizes of the process groups of a run, and the images of a rank's micro-batch."""

    world: int
    tp: int
    ep: int
    dp: int
    edp: int
    etp: int
    micro_batch: int


@dataclass(frozen=True)
class Config:
    """Everything a run is told; made by `resolve`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()

    def layout(self, world: int) -> Layout:
        """The process groups over `world` ranks; raises ConfigError where they do not come out even."""
        if problems := _sentences(self, _world_rules(self, world)):
            raise ConfigError(problems)
        tp, ep = self.parallel.tp, self.parallel.ep
        etp = tp if self.parallel.expert_tp else 1
        dp = world // tp
        micro_batch = self.train.global_batch // (dp * self.train.accumulation)
        return Layout(world, tp, ep, dp, world // (ep * etp), etp, micro_batch)


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    world: int | None = None,
) -> Config:
    """The checked config of defaults <- preset <- YAML file <- `section.key=value` overrides.

    Args:
        preset: a name in `presets.PRESETS`.
        file: YAML of sections, each a mapping of keys to values.
        overrides: arguments such as "model.depth=4".
        world: number of ranks; without it the rules on ranks are left for later.

    Raises ConfigError, listing everything that is wrong.
    """
    problems: list[str] = []
    settings: list[tuple[str, Any, str]] = []  # dotted key, value, where it comes from
    if preset is not None and preset not in PRESETS:
        problems.append(f"preset = {preset!r}: is no preset; {_suggest(preset, PRESETS)}")
    elif preset is not None:
        settings += _flatten(PRESETS[preset], f"preset {preset}", problems)
    if file is not None:
        settings += _flatten(_read_yaml(Path(file), problems), str(file), problems)
    # No rule speaks of a refused field; where a whole layer is missing, that is each field not set elsewhere.
    refused = {f"{s.name}.{f.name}" for s in fields(Config) for f in fields(s.type)} if problems else set()
    settings += _parse(overrides, problems)

    sections = {f.name: getattr(Config(), f.name) for f in fields(Config)}
    for key, value, origin in settings:
        section, _, name = key.partition(".")
        if problem := _unknown(section, name, sections):
            problems.append(f"{key} = {value!r} ({origin}): {problem}")
            continue
        kind = sections[section].__dataclass_fields__[name].type
        typed = _typed(value, kind)
        if typed is None:
            refused.add(key)
            problems.append(f"{key} = {value!r} ({origin}): must be {_KINDS[kind]}")
        else:
            refused.discard(key)
            sections[section] = replace(sections[section], **{name: typed})
    config = _with_superclasses(Config(**sections), problems, refused)
    problems += _violations(config, world, refused)
    if problems:
        raise ConfigError(problems)
    return config


def check(config: Config, world: int | None = None) -> None:
    """Raise ConfigError, listing everything, unless `config` can run (over `world` ranks, where given)."""
    if problems := _violations(config, world, set()):
        raise ConfigError(problems)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts, section by section."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """YAML that `resolve(file=...)` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# ---- reading the layers


def _with_superclasses(config: Config, problems: list[str], refused: set[str]) -> Config:
    """The config with the content of a file of super-classes in place of its path; a run is then complete."""
    model = config.model
    if model.router != "classification" or not classes.is_file(model.superclasses):
        return config
    if refused & {"model.superclasses", "model.num_classes", "model.router"}:
        return config
    try:
        text = classes.superclasses_in(Path(model.superclasses), model.num_classes)
    except classes.ClassGroupError as error:
        problems += [f"model.superclasses = {model.superclasses!r}: {problem}" for problem in error.violations]
        refused.add("model.superclasses")
        return config
    return replace(config, model=replace(model, superclasses=text))


_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def _read_yaml(path: Path, problems: list[str]) -> Mapping:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"file = {path}: cannot be read ({error.strerror}); give the path of a YAML file")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"file = {path}: is not YAML: {' '.join(str(error).split())}")
    else:
        if content is None or isinstance(content, Mapping):  # an empty file sets nothing
            return content or {}
        problems.append(f"file = {path}: must be a mapping of sections, not a {type(content).__name__}")
    return {}


def _flatten(nested: Mapping, origin: str, problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    for section, values in nested.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{name}", value, origin) for name, value in values.items())
        elif problem := _unknown(str(section), None, [f.name for f in fields(Config)]):
            problems.append(f"{section} = {values!r} ({origin}): {problem}")
        else:
            problems.append(f"{section} = {values!r} ({origin}): must be a mapping of keys to values")


def _parse(overrides: Iterable[str], problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            yield key.strip(), _Text(value.strip()), "command line"
        else:
            problems.append(f"{text!r} (command line): must be section.key=value")


class _Text(str):
    """A value typed on the command line: the type of its field decides how it is read."""


def _typed(value: Any, kind: type) -> Any:
    """`value` as a `kind`, or None where it is no such thing."""
    if kind is str:
        return str(value) if isinstance(value, str) else None
    if isinstance(value, _Text):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return None
    if kind is float and not isinstance(value, bool):
        try:  # YAML reads "1e-4" as text
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    return value if type(value) is kind else None


def _unknown(section: str, name: str | None, sections: Mapping | list) -> str | None:
    if section not in sections:
        return f"{section!r} is no section; {_suggest(section, sections)}"
    if name is None:
        return None
    known = [f.name for f in fields(sections[section])]
    return None if name in known else f"{name!r} is no key of {section}; {_suggest(name, known)}"


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


# ---- rules

# The fields it is about, the one to blame first; what it demands, with the remedy.
Rule = tuple[tuple[str, ...], str]


def _sentences(config: Config, broken: Iterable[Rule], refused: Iterable[str] = ()) -> list[str]:
    """The broken rules with the value of the field to blame, but none that speaks of a refused field."""
    values = {f"{section}.{name}": v for section, s in to_dict(config).items() for name, v in s.items()}
    return [f"{keys[0]} = {values[keys[0]]!r}: {rule}" for keys, rule in broken if not set(keys) & set(refused)]


def _violations(config: Config, world: int | None, refused: set[str]) -> list[str]:
    """Everything wrong with `config`, but nothing that speaks of a `refused` field."""
    wrong: list[Rule] = []
    safe, defaults = config, Config()
    for section in fields(Config):
        values = getattr(config, section.name)
        for f in fields(values):
            key, value = f"{section.name}.{f.name}", getattr(values, f.name)
            typed = _typed(value, f.type)
            rule = f"must be {_KINDS[f.type]}" if typed is None else _range_rule(value, f.metadata)
            if rule:
                wrong.append(((key,), rule))
            if rule or key in refused:  # the default keeps the arithmetic of the rules below safe
                values = replace(values, **{f.name: getattr(getattr(defaults, section.name), f.name)})
        safe = replace(safe, **{section.name: values})
    problems = _sentences(config, wrong, refused)
    refused = refused | {keys[0] for keys, _ in wrong}
    world_rules = () if world is None else _world_rules(safe, world)
    problems += _sentences(safe, (*_rules(safe), *world_rules), refused)
    return problems if "train.deepspeed" in refused else problems + _read_deepspeed(safe)[1]


def _range_rule(value: Any, metadata: Mapping) -> str | None:
    if metadata["choices"]:
        if value not in metadata["choices"]:
            return f"must be one of {', '.join(metadata['choices'])}; {_suggest(value, metadata['choices'])}"
    elif metadata["within"]:
        interval = metadata["within"]
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            return f"must lie in {interval}"
    return None


def _nearest(value: int, valid: Iterable[int]) -> str:
    """The valid values next to `value` on both sides, as text."""
    valid = sorted(valid)
    return ", ".join(map(str, [v for v in valid if v < value][-2:] + [v for v in valid if v > value][:2]))


def _nearest_divisors(value: int, whole: int) -> str:
    return _nearest(value, (d for d in range(1, whole + 1) if whole % d == 0))


def _nearest_multiples(value: int, unit: int) -> str:
    return ", ".join(str(m) for m in (value // unit * unit, (value // unit + 1) * unit) if m > 0)


def _rules(config: Config) -> Iterator[Rule]:
    """The rules between fields that hold for any number of ranks, where they are broken."""
    model, parallel, data, sample, train = (
        config.model,
        config.parallel,
        config.data,
        config.sample,
        config.train,
    )
    size, experts, tp = model.hidden_size, model.num_experts, parallel.tp

    if size % model.heads:
        near = _nearest_divisors(model.heads, size)
        yield ("model.heads", "model.hidden_size"), f"must divide model.hidden_size = {size}; nearest: {near}"
    if size % 4:
        near = _nearest_multiples(size, 4)
        yield ("model.hidden_size",), f"must be a multiple of 4 (sine and cosine of x and y); nearest: {near}"
    if model.input_size % model.patch_size:
        near = _nearest_divisors(model.patch_size, model.input_size)
        rule = f"must divide model.input_size = {model.input_size}; nearest: {near}"
        yield ("model.patch_size", "model.input_size"), rule

    for name, width in (("mlp_ratio", model.mlp_width), ("expert_ratio", model.expert_width)):
        if width < 1:
            rule = f"times model.hidden_size = {size} must be at least 1; use {1 / size:.3g} or more"
            yield (f"model.{name}", "model.hidden_size"), rule
    # The shared and the unconditional expert are split like a dense MLP, the routed ones with expert_tp.
    kept_whole = model.router not in TWO_STEP_ROUTERS or not (model.shared_expert or model.unconditional_expert)
    split = [("model.heads", model.heads, ("model.heads",))]
    if len(model.moe_blocks) < model.depth:
        keys = ("model.hidden_size", "model.mlp_ratio")
        split.append(("hidden_size * mlp_ratio", model.mlp_width, keys))
    if model.moe_blocks and (parallel.expert_tp or not kept_whole):
        keys = ("model.hidden_size", "model.expert_ratio")
        split.append(("hidden_size * expert_ratio", model.expert_width, keys))
    for name, width, keys in split:
        if width % tp:
            yield (
                ("parallel.tp", *keys),
                f"must divide {name} = {width}; nearest: {_nearest_divisors(tp, width)}",
            )

    if model.router == "dense":
        if parallel.ep > 1:
            yield (
                ("parallel.ep", "model.router"),
                "must be 1 with model.router = 'dense', which has no experts",
            )
        if parallel.recompute == "moe":
            rule = "must be none, blocks or all with model.router = 'dense', which has no experts"
            yield ("parallel.recompute", "model.router"), rule
    else:
        if parallel.ep > experts:
            yield ("parallel.ep", "model.num_experts"), f"must be at most model.num_experts = {experts}"
        if model.top_k > experts:
            yield ("model.top_k", "model.num_experts"), f"must be at most model.num_experts = {experts}"
        if model.moe_every > model.depth:
            rule = f"must be at most model.depth = {model.depth}, or no block has experts (set router=dense)"
            yield ("model.moe_every", "model.depth", "model.router"), rule
    yield from _guided_rules(model)
    if model.capacity_factor and model.router in ("dense", *EXPERT_CHOICE_ROUTERS):
        rule = f"must be 0 with model.router = {model.router!r}, where no expert gets more than its share"
        yield ("model.capacity_factor", "model.router"), rule
    if model.router in EXPERT_CHOICE_ROUTERS and model.expert_capacity < 1:
        most = model.tokens * model.top_k
        rule = f"must be at most {most} = tokens * top_k, or no expert may choose a token of an image"
        keys = ("num_experts", "top_k", "input_size", "patch_size", "router")
        yield tuple(f"model.{key}" for key in keys), rule

    objective = config.diffusion.objective
    methods = {"rf": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}[objective]
    if sample.method not in methods:
        rule = f"must be {' or '.join(methods)} with diffusion.objective = {objective!r}"
        yield ("sample.method", "diffusion.objective"), rule
    if objective == "ddpm" and sample.steps > 1000:
        yield (
            ("sample.steps", "diffusion.objective"),
            "must be at most 1000, the steps of DDPM's noise schedule",
        )
    if objective == "ddpm" and not model.learn_sigma:
        rule = "must be true with diffusion.objective = 'ddpm', which learns the variance"
        yield ("model.learn_sigma", "diffusion.objective"), rule
    if sample.guidance_low > sample.guidance_high:
        rule = f"must be at most sample.guidance_high = {sample.guidance_high}"
        yield ("sample.guidance_low", "sample.guidance_high"), rule

    if data.source in FIXED_SIZES:
        size = FIXED_SIZES[data.source]
        for name, needed in (("in_channels", 1), ("input_size", size), ("num_classes", 10)):
            if getattr(model, name) != needed:
                rule = (
                    f"must be {needed} with data.source = {data.source!r}: {size}x{size} pixels, 1 channel, 10 classes"
                )
                yield (f"model.{name}", "data.source"), rule
    if data.source == "latents" and not data.path:
        yield ("data.path", "data.source"), "must be the folder of the latents with data.source = 'latents'"
    for name, sources in (("path", ("latents", "fashion_mnist")), ("test_path", ("latents",)), ("cache", ("latents",))):
        if getattr(data, name) and data.source not in sources:
            rule = f"must be empty with data.source = {data.source!r}; it is for {' and '.join(sources)}"
            yield (f"data.{name}", "data.source"), rule
    if data.source == "digits" and data.flip:
        yield ("data.flip", "data.source"), "must be false with data.source = 'digits': they read one way"

    if train.warmup > train.steps:
        yield ("train.warmup", "train.steps"), f"must be at most train.steps = {train.steps}"
    if train.schedule == "cosine" and train.min_lr > train.lr:
        yield ("train.min_lr", "train.lr", "train.schedule"), f"must be at most train.lr = {train.lr}"


def _guided_rules(model: ModelConfig) -> Iterator[Rule]:
    """The rules of the routers that classes or k-means guide."""
    if model.router not in GUIDED_ROUTERS:
        return
    router = f"with model.router = {model.router!r}"
    if model.top_k != 1:
        yield ("model.top_k", "model.router"), f"must be 1 {router}, whose super-classes or clusters do not overlap"
    if model.router == "classification":
        keys = ("model.superclasses", "model.num_classes", "model.num_experts", "model.router")
        for problem in classes.superclass_problems(model.superclasses, model.num_classes, model.num_experts):
            yield keys, problem
        return
    if model.batch_scope != "global":
        rule = f"must be global {router}, whose centroids are the same on all ranks"
        yield ("model.batch_scope", "model.router"), rule
    if model.balance_weight:
        rule = f"must be 0 {router}, which has no parameters to balance; starved centroids are moved instead"
        yield ("model.balance_weight", "model.router"), rule


def _world_rules(config: Config, world: int) -> Iterator[Rule]:
    """The rules on the layout over `world` ranks, where they are broken."""
    tp, ep, train = config.parallel.tp, config.parallel.ep, config.train
    if world < 1:
        yield ("parallel.tp",), f"needs at least 1 rank, not {world}"
        return
    if world % tp:
        yield ("parallel.tp",), f"must divide the {world} ranks; nearest: {_nearest_divisors(tp, world)}"
    if world % ep:
        yield ("parallel.ep",), f"must divide the {world} ranks; nearest: {_nearest_divisors(ep, world)}"
    elif config.parallel.expert_tp and world % tp == 0 and world // tp % ep:
        near = _nearest_divisors(ep, world // tp)
        rule = f"must divide the {world} ranks / tp = {world // tp} with parallel.expert_tp; nearest: {near}"
        yield ("parallel.ep", "parallel.tp", "parallel.expert_tp"), rule
    dp = world // tp
    if world % tp == 0 and train.global_batch % (dp * train.accumulation):
        unit = dp * train.accumulation
        near = _nearest_multiples(train.global_batch, unit)
        rule = f"must be a multiple of {dp} data ranks * {train.accumulation} micro-batches; nearest: {near}"
        yield ("train.global_batch", "train.accumulation", "parallel.tp"), rule


# ---- DeepSpeed


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
    package = Path(__file__).resolve().parent
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_deepspeed(config: Config) -> dict[str, Any]:
    """The JSON that `train.deepspeed` names, as a dict of DeepSpeed's own keys; raises ConfigError."""
    content, problems = _read_deepspeed(config)
    if problems:
        raise ConfigError(problems)
    return content


def _read_deepspeed(config: Config) -> tuple[dict[str, Any], list[str]]:
    name = config.train.deepspeed
    path = Path(name) if name.endswith(".json") else find_ds_configs() / f"{name}.json"
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except OSError as error:
        known = sorted(p.stem for p in find_ds_configs().glob("*.json"))
        reason = f"cannot be read ({error.strerror}: {path}); {_suggest(name, known)}"
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
            yield "the file's 'fp16' is not supported; use bf16, or neither for fp32"
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
