"""Options of several commands that select a configuration or a run."""

import argparse
from pathlib import Path

from megapromoe.checkpoint.weights import UnknownWeights, read_weights_choice
from megapromoe.config.options import Config
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.conversion.conventions import OBJECTIVES

DEFAULT_PRESET = "digits"

OVERRIDES = """\
config: the defaults <- --preset <- --config FILE <- section.key=value, where later ones override earlier ones.
Sections are model, parallel, data, diffusion, sample and train; `megapromoe show --keys` lists their keys.
Values are written as in YAML:
  parallel.tp=2   train.lr=3e-4   model.qk_norm=layer   model.score_function=sigmoid
All mistakes are reported together, before anything starts."""


def config_options(parser: argparse.ArgumentParser) -> None:
    """Adds --preset and --config."""
    parser.add_argument("--preset", metavar="NAME", help=f"a preset: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a YAML file of sections and keys")


def checkpoint_config_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --config, --preset and --objective, for a checkpoint that does not hold its configuration."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--preset", metavar="NAME", help="a preset instead; `megapromoe show` lists them")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="training objective of a model from another code: rf (ProMoE), ddpm (DiT), repa, or sit (SiT and DiffMoE,"
        " whose time has the opposite direction)",
    )


def checkpoint_config(options: argparse.Namespace, overrides: list[str]) -> Config | None:
    """The config of --config or --preset with the overrides; None without both options. Raises ConfigError."""
    if options.config is None and options.preset is None:
        return None
    return resolve(options.preset, options.config, overrides, file_is_saved=_is_saved(options.config))


def weights_choice(text: str) -> str:
    """An argparse type: `ema`, `ema=DECAY` or `master`."""
    try:
        return read_weights_choice(text)
    except UnknownWeights as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_option(parser: argparse.ArgumentParser, text: str, required: bool = True) -> None:
    """Adds --run-dir, the folder of a run."""
    parser.add_argument("--run-dir", metavar="DIR", dest="run", type=Path, required=required, help=text)


def resolve_options(options: argparse.Namespace, world: int | None, run_warmup: int | None = None) -> Config:
    """The config of --preset, --config and the overrides. Raises ConfigError. `run_warmup`: see `resolve`."""
    preset = options.preset
    if preset is None and options.config is None:
        preset = DEFAULT_PRESET
    saved = _is_saved(options.config)
    return resolve(preset, options.config, options.overrides, world, run_warmup, file_is_saved=saved)


def _is_saved(file: Path | None) -> bool:
    """Whether a --config is a file that the program wrote: the config.yaml of a run, or a task of a study."""
    if file is None:
        return False
    run, study = file.absolute().parent, file.absolute().parent.parent
    is_run = file.name == "config.yaml" and ((run / "environment.json").exists() or (run / "checkpoints").is_dir())
    return is_run or (run.name == "tasks" and (study / "study.yaml").is_file())
