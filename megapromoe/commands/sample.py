"""`megapromoe sample`: draws images with a trained model."""

import argparse
from pathlib import Path

from megapromoe.commands.options import positive, run_option
from megapromoe.config import ConfigError

SUMMARY = "draw images with a trained model"
EPILOG = "Overrides: section `sample` only."
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    run_option(parser, "the folder of the run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .png of a grid, or .npz of arrays")
    parser.add_argument("--class", metavar="C", dest="classes", type=int, nargs="+", help="classes; default: all")
    parser.add_argument(
        "--count",
        "--per-class",
        metavar="N",
        type=positive,
        default=10,
        help="images of each class; default: 10",
    )
    parser.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step; default: the last")
    parser.add_argument(
        "--weights", choices=("ema", "master"), default="ema", help="averaged weights (default) or as trained"
    )
    for option, text in (
        ("--guidance", "classifier-free guidance scale; 1 is none"),
        ("--steps", "steps of the sampler"),
        ("--seed", "seed of the images"),
        ("--method", "sampler"),
    ):  # short for overrides
        parser.add_argument(option, metavar="X", help=f"{text}; default: as the run's config says")


def run(options: argparse.Namespace, launch) -> int:
    from megapromoe.training import runtime

    runtime.prepare()
    from megapromoe.evaluation.generate import sample_command

    short = {name: getattr(options, name) for name in ("guidance", "steps", "seed", "method")}
    overrides = [*options.overrides, *(f"sample.{name}={v}" for name, v in short.items() if v is not None)]
    if wrong := [a for a in overrides if not a.startswith("sample.")]:
        raise ConfigError([f"{a!r} (command line): sampling takes only sample.key=value" for a in wrong])
    sample_command(
        options.run,
        options.out,
        options.classes,
        options.count,
        options.step,
        options.weights,
        overrides,
        launch,
    )
    return 0
