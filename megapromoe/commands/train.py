"""`megapromoe train`: trains a model, or continues a run."""

import argparse
import sys

from megapromoe.commands.command_line import CommandError
from megapromoe.commands.options import DEFAULT_PRESET, OVERRIDES, config_options, resolve_options, run_option
from megapromoe.commands.show import describe
from megapromoe.config.renamed_options import present_names
from megapromoe.config.resolve import check_trainable
from megapromoe.imports import uncollected

EPILOG = f"""\
Start it as one process, or with torchrun, deepspeed, mpirun or srun, where every rank runs the same command.
Repeat the command to continue a run from its last checkpoint, on any number of ranks. Ctrl-C saves and stops
(exit code 75), a second Ctrl-C stops immediately (130). Without --preset and --config the preset is {DEFAULT_PRESET}.

{OVERRIDES}
Settings that define the run may not change between starts: model, data, diffusion, the batch, AdamW's
constants and the seed.

A new run starts from random weights, or with train.init_from=PATH from those of a checkpoint: a run, one of its
steps, a .pth, safetensors, a folder of diffusers or DeepSpeed. It may have other classes, sizes or experts:
  train.init_weights=ema|ema=DECAY|master    which weights to take; default ema
  train.init_classes=same|new|FILE           the source's class of each class; FILE is YAML or JSON, new: old
--dry-run prints what would be taken, made new and left out: docs/finetune.md."""
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    run_option(parser, "the folder of the run; created if needed")
    parser.add_argument(
        "--step",
        metavar="N",
        type=int,
        help="continue from the checkpoint of this step; later ones are moved to branches/. If repeated, the command"
        " continues the new branch. Default: the newest complete checkpoint",
    )
    parser.add_argument("--fork", metavar="NAME", help="with --step: start another branch with this name")
    parser.add_argument(
        "--allow",
        metavar="KEY",
        action="append",
        default=[],
        help="allow this setting, such as data.seed, to differ from the run's (data: other latents at data.path; run:"
        " the checkpoint of another run); repeatable",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="open the data and the folder, print a summary and all errors, but start and write nothing",
    )
    parser.add_argument(
        "--yaml",
        action="store_true",
        help="with --dry-run: print the whole configuration, as a file that --config reads, instead of the summary",
    )


def run(options: argparse.Namespace, launch) -> int:
    if options.yaml and not options.dry_run:
        raise CommandError("--yaml: is only for --dry-run; `megapromoe show` also prints a configuration")
    from megapromoe.checkpoint.run_directory import RunDirectory

    config = resolve_options(options, launch.world, RunDirectory(options.run).warmup())
    options.allow = present_names(options.allow)
    if options.dry_run:
        from megapromoe.training.dry_run import examine_start
        from megapromoe.training.summary import starting, summary

        examined = examine_start(config, options.run, options.allow, options.step, options.fork)
        state, dataset, refused, initial = examined
        if launch.rank == 0 and options.yaml:
            print("\n".join(describe(config, launch.world)))
            print(f"#\n# run directory\n# {options.run}: {state}".replace("\n  ", "\n#   "))
        elif launch.rank == 0:
            print("\n".join([*summary(config, launch.world, options.run, state, dataset), *starting(initial)]))
        if refused:
            sys.stdout.flush()  # before the error, which goes to stderr
            raise refused
        return 0
    check_trainable(config)
    from megapromoe.distributed import runtime

    runtime.prepare()
    with uncollected():
        from megapromoe.training.loop import train

    train(config, options.run, launch, options.step, tuple(options.allow), options.fork)
    return 0
