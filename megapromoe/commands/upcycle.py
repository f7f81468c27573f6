"""`megapromoe upcycle`: initializes a ProMoE from a trained model, as a run that starts at step 0."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megapromoe.commands.command_line import CommandError, file_errors, positive, refuse_other_words
from megapromoe.commands.options import checkpoint_config, checkpoint_config_options, weights_choice

EPILOG = """\
SOURCE is a checkpoint of any format (see `megapromoe convert --help`). The new model has the config of SOURCE, changed
by model.router=promoe and the given settings.

  A dense DiT     its MLPs become experts, and the prototypes are computed by k-means over the MLP inputs of the dense
                  model on data. --how slice divides the hidden units of an MLP among the shared and the routed experts;
                  if model.expert_ratio is half of model.mlp_ratio (the default), the new model starts with the outputs
                  of the old one. --how copy gives each expert the whole MLP (model.expert_ratio = model.mlp_ratio).
  A ProMoE        with model.num_experts=N, a multiple of its number: each expert is split into several, with noise.

DEST is a run directory; train it with
  megapromoe train --run-dir DEST --config DEST/config.yaml

examples:
  megapromoe upcycle runs/dit_b runs/promoe_b model.num_experts=12 --num-images 256
  megapromoe upcycle runs/promoe_b runs/promoe_b_e24 model.num_experts=24 --noise 0.02

exit codes: 0 done, 1 a checkpoint cannot be read, used or written, 2 the command or the config is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe upcycle SOURCE DEST [options] [section.key=value ...]"
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the trained checkpoint")
    parser.add_argument("dest", type=Path, metavar="DEST", help="the new run directory")
    parser.add_argument(
        "--how", choices=("slice", "copy"), default="slice", help="initialization from a dense model; default: slice"
    )
    parser.add_argument(
        "--noise", type=float, default=0.01, help="noise on routed experts, relative to their σ; default: 0.01"
    )
    parser.add_argument(
        "--spread", type=float, default=0.05, help="noise on split prototypes, relative to their length; default: 0.05"
    )
    parser.add_argument(
        "--num-images",
        type=positive,
        default=64,
        metavar="N",
        help="from dense: number of images for k-means; default: 64",
    )
    parser.add_argument(
        "--weights",
        type=weights_choice,
        default="ema",
        metavar="WEIGHTS",
        help="weights of SOURCE to use: ema, ema=DECAY or master; default: ema",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and k-means; default: 0")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint in SOURCE; default: the latest")
    checkpoint_config_options(parser, "YAML of SOURCE's run, if SOURCE has no configuration")
    parser.add_argument("--overwrite", action="store_true", help="replace a DEST that has not been trained")


def run(options: argparse.Namespace, launch: None) -> int:
    refuse_other_words(options, "SOURCE and DEST are the only paths")
    for name in ("noise", "spread"):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise CommandError(f"--{name} {value}: must be a finite number, 0 or more")
    with file_errors():
        from megapromoe.conversion.formats import with_latest

        notes = with_latest(options.source, options.step, lambda step: _upcycle(options, step))
    for note in notes:
        print(f"note: {note}")
    print(f"{options.dest}: step 0; megapromoe train --run-dir {options.dest} --config {options.dest / 'config.yaml'}")
    return 0


def _upcycle(options: argparse.Namespace, step: int | None) -> list[str]:
    """Writes the new run; returns notes for the user."""
    from megapromoe.checkpoint.average import share_in_words
    from megapromoe.checkpoint.weights import AVERAGE, MASTER, is_average
    from megapromoe.config.options import to_dict
    from megapromoe.conversion.exports import export, exported_bytes
    from megapromoe.conversion.formats import open_state
    from megapromoe.conversion.state import checked, config_from, with_one_average
    from megapromoe.conversion.upcycle import check_fit, cluster, from_dense, grow, moe_inputs
    from megapromoe.work_progress import Progress, track

    config = checkpoint_config(options, [])
    opened = open_state(options.source, config=config, step=step, objective=options.objective)
    source = checked(with_one_average(opened, options.weights))
    weights = AVERAGE if is_average(options.weights) else MASTER
    dense = source.config.model.router == "dense"
    router = ["model.router=promoe"] if dense else []
    config = config_from(to_dict(source.config), [*router, *options.overrides])
    if dense:
        check_fit(source, config, options.how)
        tokens = moe_inputs(source, config, options.num_images, weights)
        layers = track(tokens.items(), "layer", "k-means")
        prototypes = {block: cluster(x_TD, config, options.seed) for block, x_TD in layers}
        state = from_dense(source, config, prototypes, options.how, options.noise, weights, options.seed)
    else:
        state = grow(source, config, options.noise, options.spread, weights, options.seed)
    with Progress(exported_bytes(state, "ours"), "B", f"writing {options.dest}") as progress:
        notes = export(state, options.dest, "ours", overwrite=options.overwrite, progress=progress.update)
    average = source.average
    share = share_in_words(average.initial_share if average else None)
    chosen = f"averaged weights ({options.weights}), {share}"
    taken = f"from {chosen if weights == AVERAGE else 'weights as trained (master)'}"
    warning = average.warning(weights) if average else ""
    return [*state.notes, *notes, taken, *([f"warning: {warning}"] if warning else [])]
