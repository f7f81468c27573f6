"""`megapromoe sample`: samples images from a trained model, as one picture or as a large set."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import positive
from megapromoe.commands.options import run_option, weights_choice
from megapromoe.config.options import SAMPLING_METHODS, ConfigError
from megapromoe.imports import uncollected

if TYPE_CHECKING:  # imported by the functions that need them: torch is slow to import
    from megapromoe.distributed.runtime import LaunchEnvironment
    from megapromoe.sampling.prompts import Prompt
    from megapromoe.sampling.request import GenerationRequest

EPILOG = """\
With --count: a few images of each class, as one picture (.png, a row for each class) or as arrays (.npz:
`images`, float in [-1, 1], `labels`, `seed`).
With --num-images: a set of this many images, as a folder of PNG files or one .npz in the layout of guided-diffusion
(`arr_0`, uint8 NHWC; `arr_1`, labels). Start it under torchrun, srun or mpirun to divide the work: the images
are the same for any number of ranks. Repeat the command to continue after an interruption.

With --prompt or --prompts, for a model of texts (model.condition=text): --count and --num-images are images of each
prompt. The text encoder is that of the run's captions; an empty prompt is an image without a condition. A file of
prompts has one on each line; a .jsonl has lines {"prompt": "a red three", "seed": 7, "id": "r3"}, where seed and id may
be left out. --geneval takes GenEval's evaluation_metadata.jsonl and writes its folders, of 4 images a prompt.

examples:
  megapromoe sample --run-dir runs/digits
  megapromoe sample --run-dir runs/digits --class 3 --guidance 1.5 --out grid.png
  megapromoe sample --run-dir runs/digits --num-images 1000 --guidance 1 1.5 2 --out samples.npz
  torchrun --nproc-per-node 8 -m megapromoe sample --run-dir runs/xl --num-images 50000 --out samples.npz \\
      --autoencoder models/sd-vae-ft-ema
  torchrun --nproc-per-node 8 -m megapromoe sample --run-dir runs/xl --num-images 50000 --ep 4 --out set \\
      --autoencoder models/sd-vae-ft-ema
                                                  each model is split over 4 ranks, in 2 groups
  megapromoe sample --run-dir runs/scenes --prompt "two red threes above a blue seven" --guidance 5 --method unipc
  megapromoe sample --run-dir runs/scenes --prompts prompts.txt --num-images 16 --out samples.npz
  megapromoe sample --run-dir runs/t2i --geneval evaluation_metadata.jsonl --autoencoder models/vae --out geneval

Overrides: section `sample` only."""
JOB = True
CLASS_IMAGES, PROMPT_IMAGES = 10, 4  # images of each class or prompt, unless the command has a number; GenEval has 4


def arguments(parser: argparse.ArgumentParser) -> None:
    run_option(parser, "the folder of the run")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="a .png for a grid or a .npz for arrays; with --num-images: a folder for PNG files, or a .npz. Default: in"
        " RUN/samples, a .png, or with --num-images a folder. Its name has the step and a digest of the request, so"
        " that different requests have different files",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--count",
        metavar="N",
        type=positive,
        help="images of each class or prompt; default: 10 of a class, 4 of a prompt",
    )
    num_option(amount, "sample a set of N images in total, or of each prompt")
    _prompt_options(parser)
    drawing_options(parser)


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="what the images show, in words; may be repeated"
    )
    texts.add_argument("--prompts", metavar="FILE", type=Path, help="a file of prompts: one a line, or a .jsonl")
    texts.add_argument("--geneval", metavar="FILE", type=Path, help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument(
        "--text-encoder", metavar="PATH", help="encoder of the prompts, if its folder is not where the run's data names"
    )


def num_option(parser: argparse._ActionsContainer, text: str) -> None:
    """Adds --num-images, the number of images of a set."""
    parser.add_argument("--num-images", metavar="N", type=positive, help=text)


def drawing_options(parser: argparse.ArgumentParser, several_steps: bool = False) -> None:
    """Adds the sampling options that `generation_request` reads; `several_steps`: --step takes a list."""
    parser.add_argument("--class", metavar="C", dest="only", type=int, nargs="+", help="classes; default: all")
    parser.add_argument(
        "--labels",
        choices=("balanced", "random"),
        help="with --num-images: equally many images of each class (default), or a random class for each image",
    )
    if several_steps:
        parser.add_argument(
            "--step",
            metavar="N",
            type=int,
            nargs="+",
            help="the checkpoints or snapshots of these steps; default: the last",
        )
    else:
        text = "the checkpoint or snapshot of this step; default: the last checkpoint"
        parser.add_argument("--step", metavar="N", type=int, help=text)
    parser.add_argument(
        "--weights",
        type=weights_choice,
        default="ema",
        metavar="WEIGHTS",
        help="averaged weights (ema, default), those of one of several decays (ema=DECAY), or weights as trained"
        " (master)",
    )
    parser.add_argument(
        "--guidance",
        metavar="X",
        nargs="+",
        default=[],
        help="classifier-free guidance scale, 1: no guidance; with --num-images several, for a set each;"
        " default: from the run's config",
    )
    for option, metavar, text in (
        ("--steps", "N", "number of sampling steps"),
        ("--seed", "N", "seed of the images"),
        ("--method", "NAME", f"sampling method: {', '.join(SAMPLING_METHODS)}, or FILE.py:FUNCTION"),
    ):  # short for overrides
        parser.add_argument(option, metavar=metavar, help=f"{text}; default: from the run's config")
    parser.add_argument(
        "--autoencoder", metavar="PATH", help="autoencoder that decodes sampled latents: a folder or a name on the hub"
    )
    for option, text in (("--tp", "tensor"), ("--ep", "expert")):
        parser.add_argument(
            option,
            metavar="N",
            type=positive,
            default=1,
            help=f"with --num-images: {text}-parallel size, for a model too large for one rank",
        )


def generation_request(options: argparse.Namespace, out: Path, named: bool = False) -> GenerationRequest:
    """The request of the options: a set with --num-images, else --count images of each class. Raises ConfigError."""
    from megapromoe.sampling.request import GenerationRequest

    return GenerationRequest(
        run=options.run,
        out=out,
        num=options.num_images or options.count or CLASS_IMAGES,
        classes=options.labels or "balanced",
        only=None if options.only is None else tuple(options.only),
        scales=tuple(options.guidance),
        step=options.step,
        weights=options.weights,
        overrides=tuple(_sample_overrides(options)),
        autoencoder=options.autoencoder,
        tp=options.tp,
        ep=options.ep,
        named=named,
        preview=options.num_images is None,
    )


def _sample_overrides(options: argparse.Namespace) -> list[str]:
    """All `sample.key=value` settings except the guidance scales. Raises ConfigError for settings of other sections."""
    short = {name: getattr(options, name) for name in ("steps", "seed", "method")}
    overrides = [*options.overrides, *(f"sample.{name}={v}" for name, v in short.items() if v is not None)]
    if wrong := [a for a in overrides if not a.startswith("sample.")]:
        raise ConfigError([f"{a!r} (command line): sampling takes only sample.key=value" for a in wrong])
    return overrides


def run(options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    from megapromoe.distributed import runtime

    runtime.prepare()
    prompts = _prompts(options)
    if prompts is not None:
        options.count = options.count or PROMPT_IMAGES
    if options.geneval is not None:
        options.num_images = options.num_images or options.count
    name = "step" if options.geneval is None else "geneval"
    place = options.out or options.run / "samples" / (f"{name}.png" if options.num_images is None else name)
    request = replace(
        generation_request(options, place),
        complete_name=options.out is None,
        prompts=prompts,
        text_encoder=options.text_encoder,
        geneval=options.geneval is not None,
    )
    if prompts is not None and options.labels:
        raise ConfigError([f"--labels {options.labels}: is for classes, and the command has prompts; leave it out"])
    if request.preview:
        needed = {"--labels": options.labels, "--tp": options.tp > 1, "--ep": options.ep > 1}
        needed["--guidance with several scales"] = len(options.guidance) > 1
        if wrong := [f"{option}: needs --num-images, a set of images" for option, used in needed.items() if used]:
            raise ConfigError(wrong)
    with uncollected():
        from megapromoe.sampling.generation import generate_images

    generate_images(request, launch)
    return 0


def _prompts(options: argparse.Namespace) -> tuple[Prompt, ...] | None:
    """The prompts of the options; None for classes. Raises SampleError."""
    if options.prompt is None and options.prompts is None and options.geneval is None:
        return None
    from megapromoe.sampling.prompts import prompt_of, read_geneval, read_prompts

    if options.prompt is not None:
        return tuple(prompt_of(text) for text in options.prompt)
    if options.prompts is not None:
        return tuple(read_prompts(options.prompts))
    return tuple(read_geneval(options.geneval))
