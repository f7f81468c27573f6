"""Options that choose a configuration or a run, which several commands share."""

import argparse
from pathlib import Path

from megapromoe.config.options import Config
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.conversion.conventions import OBJECTIVES

DEFAULT_PRESET = "digits"

OVERRIDES = """\
config: the defaults <- --preset <- --config FILE <- section.key=value, each over the one before.
Sections are model, parallel, data, diffusion, sample and train; `megapromoe show --keys` lists their keys.
Values are written as in YAML:
  parallel.tp=2   train.lr=3e-4   model.qk_norm=true   model.gate=sigmoid
All that is wrong is told at once, before anything starts."""


def config_options(parser: argparse.ArgumentParser) -> None:
    """Adds --preset and --config."""
    parser.add_argument("--preset", metavar="NAME", help=f"a recipe: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a YAML file of sections and keys")


def checkpoint_config_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --config, --preset and --objective, for a checkpoint that does not hold its configuration."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--preset", metavar="NAME", help="a recipe instead; `megapromoe show` lists them")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what a foreign model was trained to predict: rf (ours, ProMoE), ddpm (DiT), repa, or sit (SiT and"
        " DiffMoE's flow, whose time runs the other way)",
    )


def checkpoint_config(options: argparse.Namespace, overrides: list[str]) -> Config | None:
    """The config that --config or --preset give, with overrides; None without either. Raises ConfigError."""
    if options.config is None and options.preset is None:
        return None
    return resolve(preset=options.preset, file=options.config, overrides=overrides)


def run_option(parser: argparse.ArgumentParser, text: str, required: bool = True) -> None:
    """Adds --run, the folder of a run."""
    # torchrun takes --run for an abbreviation of options of its own, wherever it stands.
    text += "; under torchrun write --run-dir"
    parser.add_argument("--run", "--run-dir", metavar="DIR", dest="run", type=Path, required=required, help=text)


def resolve_options(options: argparse.Namespace, world: int | None, run_warmup: int | None = None) -> Config:
    """The config that --preset, --config and the overrides make; raises ConfigError. See `resolve` for `run_warmup`."""
    preset = options.preset
    if preset is None and options.config is None:
        preset = DEFAULT_PRESET
    return resolve(preset, options.config, options.overrides, world, run_warmup)
