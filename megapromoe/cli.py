"""The command line: `megapromoe train | sample | show`.

Torch and deepspeed are imported by the command that needs them, so that help and `show` are there at once.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from megapromoe import __version__
from megapromoe.config import Config, ConfigError, check, resolve, to_yaml
from megapromoe.cost import flops_per_image, memory_per_rank, parameters
from megapromoe.presets import PRESETS

DEFAULT_PRESET = "digits"
# Once a rank has failed, launchers end the others: those that leave the message to rank 0 give it so many seconds.
GRACE = 5.0

_EXAMPLES = """\
examples:
  megapromoe show                                          the presets
  megapromoe show --preset promoe_b --ranks 8 parallel.ep=8
  megapromoe train --run runs/digits                       digits, one process
  torchrun --nproc-per-node 4 -m megapromoe train --run-dir runs/digits parallel.tp=2 parallel.ep=2
  megapromoe sample --run runs/digits --class 3 --guidance 1.5 --out grid.png

exit codes: 0 done, 1 the run failed, 2 the command, the config or the launcher is wrong, 75 stopped by a
signal and saved (repeat the command), 130 interrupted
`megapromoe COMMAND --help` tells more of a command."""

_OVERRIDES = """\
config: the defaults <- --preset <- --config FILE <- section.key=value, each over the one before.
Sections are model, parallel, data, diffusion, sample and train; `megapromoe show --keys` lists their keys.
Values are written as in YAML:
  parallel.tp=2   train.lr=3e-4   model.qk_norm=true   model.gate=sigmoid
All that is wrong is told at once, before anything starts."""

_TRAIN = f"""\
Start it alone, or by torchrun, deepspeed, mpirun or srun: every rank runs the same command. Repeat the
command to continue a run from its last checkpoint, on as many ranks as you like. Without --preset and
--config the preset is {DEFAULT_PRESET}.

{_OVERRIDES}
What makes a run what it is may not change between starts: model, data, diffusion, the batch, AdamW's
constants and the seed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code, as `--help` lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Overrides may stand anywhere, also after options that take a list.
    overrides = [a for a in arguments if re.match(r"\w+\.\w+=", a)]
    parser = _parser()
    options, rest = parser.parse_known_args([a for a in arguments if not re.match(r"\w+\.\w+=", a)])
    if unknown := [a for a in rest if a.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see megapromoe {options.command} --help")
    options.overrides = overrides + rest
    try:
        if options.command == "show":
            return _show(options)
        return _as_a_rank(options)
    except ConfigError as error:
        print(f"megapromoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megapromoe: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megapromoe",
        description="Expert-parallel training of ProMoE diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megapromoe {__version__}")
    # The deepspeed launcher puts it before the command; runtime.py reads the same from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            usage=f"megapromoe {name} [options] [section.key=value ...]",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def config_options(to: argparse.ArgumentParser) -> None:
        to.add_argument("--preset", metavar="NAME", help=f"a recipe: {', '.join(PRESETS)}")
        to.add_argument("--config", metavar="FILE", type=Path, help="a YAML file of sections and keys")

    def run_option(to: argparse.ArgumentParser, text: str) -> None:
        # torchrun takes --run for an abbreviation of options of its own, wherever it stands.
        text += "; under torchrun write --run-dir"
        to.add_argument("--run", "--run-dir", metavar="DIR", dest="run", type=Path, required=True, help=text)

    train = command("train", "train a model, or continue a run", _TRAIN)
    config_options(train)
    run_option(train, "the folder of the run; made if needed")
    train.add_argument(
        "--step", metavar="N", type=int, help="resume from this step's checkpoint; default: newest whole"
    )
    train.add_argument(
        "--allow",
        metavar="KEY",
        action="append",
        default=[],
        help="let this setting, such as data.seed, differ from the run's; may be repeated",
    )
    train.add_argument("--dry-run", action="store_true", help="say what would be done, start nothing")

    sample = command("sample", "draw images with a trained model", "Overrides: section `sample` only.")
    run_option(sample, "the folder of the run")
    sample.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .png of a grid, or .npz of arrays")
    sample.add_argument("--class", metavar="C", dest="classes", type=int, nargs="+", help="classes; default: all")
    sample.add_argument(
        "--count",
        "--per-class",
        metavar="N",
        type=_positive,
        default=10,
        help="images of each class; default: 10",
    )
    sample.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step; default: the last")
    sample.add_argument(
        "--weights", choices=("ema", "master"), default="ema", help="averaged weights (default) or as trained"
    )
    for option, text in (
        ("--guidance", "classifier-free guidance scale; 1 is none"),
        ("--steps", "steps of the sampler"),
        ("--seed", "seed of the images"),
        ("--method", "sampler"),
    ):  # short for overrides
        sample.add_argument(option, metavar="X", help=f"{text}; default: as the run's config says")

    show = command("show", "print presets, a resolved config, its size and its layout", _OVERRIDES)
    config_options(show)
    show.add_argument("--ranks", metavar="N", type=_positive, help="ranks; default: the fewest that tp and ep allow")
    show.add_argument("--keys", action="store_true", help="list every config key with its default and meaning")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _as_a_rank(options: argparse.Namespace) -> int:
    """Runs `train` or `sample` as one rank of a job; an error that all ranks meet is told by rank 0 alone."""
    from megapromoe.training import runtime

    try:
        launch = runtime.detect()
    except runtime.LaunchError as error:  # no rank is known yet
        print(f"megapromoe: {error}", file=sys.stderr)
        return 2
    log = logging.getLogger("megapromoe")
    log.setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    try:
        return (_train if options.command == "train" else _sample)(options, launch)
    except Exception as error:
        if not _is_for_the_user(error):
            if launch.world > 1:
                runtime.leave(error)
            raise
        shared = isinstance(error, ConfigError) or getattr(error, "everywhere", False)
        if launch.rank == 0 or not shared:
            rank = f", rank {launch.rank}" if launch.rank else ""
            print(f"megapromoe{rank}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(GRACE)
        return 2 if isinstance(error, ConfigError) else getattr(error, "exit_code", 1)


def _is_for_the_user(error: Exception) -> bool:
    """Is it an error that this package raises with a sentence? Any other is a bug and keeps its traceback."""
    if type(error).__module__.startswith("megapromoe."):
        return True
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return isinstance(error, ValueError) and place.tb_frame.f_globals["__name__"].startswith("megapromoe.")


def _train(options: argparse.Namespace, launch) -> int:
    from megapromoe.training import runtime

    config = _resolve(options, launch.world)
    if options.dry_run:
        from megapromoe.training.run_directory import RunDirectory

        state = RunDirectory(options.run).state(config, options.allow)
        if launch.rank == 0:
            print("\n".join(_description(config, launch.world)))
            print(f"#\n# run directory\n# {state}".replace("\n  ", "\n#   "))
        return 0
    runtime.prepare()
    from megapromoe.training.loop import train

    train(config, options.run, launch, options.step, tuple(options.allow))
    return 0


def _sample(options: argparse.Namespace, launch) -> int:
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


def _resolve(options: argparse.Namespace, world: int | None) -> Config:
    preset = options.preset
    if preset is None and options.config is None:
        preset = DEFAULT_PRESET
    return resolve(preset, options.config, options.overrides, world)


def _show(options: argparse.Namespace) -> int:
    if options.keys:
        lines = _keys()
    elif options.preset is None and options.config is None and options.ranks is None and not options.overrides:
        lines = _presets()
    else:
        config = _resolve(options, options.ranks)
        world = options.ranks or _fewest_ranks(config)
        check(config, world)
        lines = _description(config, world)
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has had enough; nor may Python's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fewest_ranks(config: Config) -> int:
    tp, ep = config.parallel.tp, config.parallel.ep
    return tp * ep if config.parallel.expert_tp else math.lcm(tp, ep)


def _presets() -> Iterator[str]:
    yield "preset          router         D   L     E K    parameters        active  GFLOP/image  data"
    for name in PRESETS:
        config = resolve(name)
        model, count = config.model, parameters(config.model)
        experts = f"{model.num_experts:4} {model.top_k}" if model.moe_blocks else "   - -"
        flops = flops_per_image(model).forward / 1e9
        yield (
            f"{name:15} {model.router:10} {model.hidden_size:5} {model.depth:3}  {experts} {count.total:13,}"
            f" {count.active:13,} {flops:12.4g}  {config.data.source}, {config.train.steps:,} steps"
        )
    yield ""
    yield "D hidden size, L blocks, E routed experts, K of them per token; active: what a token meets;"
    yield "GFLOP of a forward pass."
    yield "megapromoe show --preset NAME prints one in full, --keys what can be set."


def _keys() -> Iterator[str]:
    for section in fields(Config):
        yield f"{section.name}: {section.type.__doc__.splitlines()[0]}"
        for f in fields(section.type):
            valid = " | ".join(f.metadata["choices"]) or f.metadata["within"]
            # YAML as in files: true, not True.
            default = {True: "true", False: "false"}[f.default] if f.type is bool else f.default
            setting = f"{section.name}.{f.name}={default}"
            yield f"  {setting:34} {f.metadata['help']}" + (f" ({valid})" if valid else "")
        yield ""


def _description(config: Config, world: int) -> Iterator[str]:
    """The config as YAML, then, as comments, what it amounts to: together a file that --config reads."""
    model, layout = config.model, config.layout(world)
    count, flops = parameters(model), flops_per_image(model)
    yield to_yaml(config)
    yield "# size"
    yield f"# parameters: total {count.total:,}  trainable {count.trainable:,}  active {count.active:,}"
    yield f"# FLOPs per image: forward {flops.forward:,}  training step {flops.training:,}"
    yield f"#   {'part':22} {'parameters':>15} {'forward FLOPs':>19}"
    for part, number in count.by_part.items():
        yield f"#   {part:22} {number:15,} {flops.by_part.get(part, 0):19,}"
    yield "#"
    yield f"# layout over {world} rank{'s' * (world > 1)}"
    yield f"# tensor parallel tp {layout.tp} x data parallel dp {layout.dp}"
    if model.moe_blocks:
        split = f" x each expert over {layout.etp}" if layout.etp > 1 else ""
        yield f"# expert parallel ep {layout.ep} x expert data parallel edp {layout.edp}{split}"
        share, more = divmod(model.num_experts, layout.ep)
        counts = ((share + 1, more), (share, layout.ep - more))
        ranks = ", ".join(f"{n} on {r} rank{'s' * (r > 1)}" for n, r in counts if r)
        yield f"# routed experts of each MoE block: {ranks} of an ep group"
    train = config.train
    yield (
        f"# global batch {train.global_batch} = micro-batch {layout.micro_batch} x dp {layout.dp}"
        f" x accumulation {train.accumulation}"
    )
    memory = memory_per_rank(config, world)
    states = ("parameters", "gradients", "optimizer", "ema")
    listed = "  ".join(f"{name} {_size(getattr(memory, name))}" for name in states)
    yield f"# states on the fullest rank, without activations: {listed}"
    yield f"#   on the device {_size(memory.device)}, on the host {_size(memory.host)}"


def _size(count: int) -> str:
    """Bytes in words."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
