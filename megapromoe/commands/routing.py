"""`megapromoe routing`: what the experts of a run have learnt; `trace`: their load; `place`: ranks for them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megapromoe.commands import routing_place, routing_trace
from megapromoe.commands.command_line import (
    CommandError,
    comma_separated,
    file_errors,
    takes_no_settings,
    whole_number,
)
from megapromoe.commands.options import run_option, weights_choice
from megapromoe.imports import uncollected

EPILOG = """\
The command runs the model of the run on images of the training data at a few noise levels, and analyses the routing:
expert by class, load over layers and noise levels, subsets of classes, token-to-expert maps of images, t-SNE of tokens
by expert and by class, distances between and within classes, similarity of the router's vectors, diversity of the
experts' weights. The page explains each measure.

Of a model of texts it analyses experts by word of the caption instead of classes, subsets and distances. Of a model of
scenes also experts by digit and colour that a token shows, and by task: pictures of the prompts of six tasks, which the
text encoder of the run encodes.

A file of subsets (YAML or JSON) maps names to classes:
    animals: [2, 3, "5-7"]
    vehicles: [0, 1, 8, 9]
Without such a file each class is a subset; with more than 20 classes, two random subsets of up to 200 are compared.

`megapromoe routing trace` shows the load over the steps of a run that recorded it (train.routing_trace_every): the
median, p95 and maximum over steps of the fullest expert and the fullest rank over the mean, and a heat map. --routes
also runs the model of several checkpoints or snapshots on the same images, and shows the share of tokens that changed
their expert. It writes trace.json, trace.png and, with --routes, routes.jsonl.

`megapromoe routing place` chooses which expert-parallel rank has which experts, such that the fullest rank has few
rows, and writes a file for parallel.placement. It uses the load of the last 1,000 steps (or --from-step, --to-step),
from the trace of the run, or without one from its metrics.jsonl. With --replicas ranks also get copies of popular
experts, whose rows they share. The command then shows the fullest rank over the mean in the later half of the steps,
for copies chosen from the first half, and what they cost in memory and bytes.

examples:
  megapromoe routing --run-dir runs/digits
  megapromoe routing trace --run-dir runs/digits
  megapromoe routing trace --run-dir runs/digits --routes --route-steps 250,500 --num-images 100
  megapromoe routing place --run-dir runs/digits --ep 4 --out placement.yaml
  megapromoe routing place --run-dir runs/digits --ep 4 --replicas auto --out placement.yaml
  megapromoe routing --run-dir runs/promoe_l --num-images 2000 --layers 3,11,19 --levels 0.1,0.3,0.5,0.7,0.9
  megapromoe routing --run-dir runs/promoe_l --subsets animals_and_vehicles.yaml --out reports/animals --pictures
  megapromoe routing --run-dir runs/scenes --num-images 1000

exit codes: 0 done, 1 the run cannot be read or has no routing, 2 the command is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe routing [trace|place] --run-dir DIR [options]"
    takes_no_settings(parser)
    parser.add_argument(
        "action",
        nargs="?",
        choices=("trace", "place"),
        help="show the recorded load over the steps of the run; choose the ranks of its experts",
    )
    run_option(parser, "the folder of the run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder, for place a file; default: RUN/routing")
    parser.add_argument(
        "--num-images", type=whole_number(1), default=500, metavar="N", help="number of training images; default: 500"
    )
    parser.add_argument(
        "--layers", type=comma_separated(int), metavar="B,B,...", help="indices of blocks; default: all with experts"
    )
    parser.add_argument(
        "--levels", type=comma_separated(float), default=(0.1, 0.5, 0.9), metavar="Q,Q,...",
        help="noise levels, as quantiles of the training distribution; default: 0.1,0.5,0.9. t-SNE uses the middle one",
    )  # fmt: skip
    parser.add_argument("--subsets", type=Path, metavar="FILE", help="file of subsets of classes to compare")
    parser.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="encoder of the prompts of tasks, for a model of scenes, if its folder is not where the run's data names",
    )
    parser.add_argument("--no-tasks", action="store_true", help="leave out the tasks, which need the text encoder")
    parser.add_argument(
        "--tokens",
        type=whole_number(10, 2000),
        metavar="N",
        help="number of tokens for t-SNE; default and maximum: 2000; for models of classes",
    )
    parser.add_argument(
        "--singular-vectors",
        type=whole_number(0),
        default=0,
        metavar="K",
        help="number of singular vectors for the overlap of experts; default 0: channels / 8",
    )
    parser.add_argument("--step", type=whole_number(0), metavar="N", help="step of the checkpoint; default: the latest")
    parser.add_argument(
        "--weights",
        type=weights_choice,
        default="ema",
        metavar="WEIGHTS",
        help="averaged weights (ema), those of one of several decays (ema=DECAY), or weights as trained (master);"
        " default: ema",
    )
    parser.add_argument("--pictures", action="store_true", help="also write each picture as a PNG file")
    routing_trace.arguments(parser)
    routing_place.arguments(parser)


def run(options: argparse.Namespace, launch: None) -> int:
    routing_place.check_options(options)
    if options.action == "place":
        return routing_place.run(options)
    routing_trace.check_options(options)
    if options.action == "trace":
        return routing_trace.run(options)
    from megapromoe.config.options import ConfigError

    with uncollected():
        from megapromoe.evaluation.scene_routing import images_of_tasks
        from megapromoe.routing_analysis.observe import RoutingError
        from megapromoe.routing_analysis.report import Request, layer_table, write_routing_report
        from megapromoe.sampling.run_model import run_config

    out, tokens = options.out or options.run / "routing", options.tokens or 2000
    request = Request(
        options.num_images, options.levels, options.layers, options.subsets, tokens, options.singular_vectors
    )
    tasks = None if options.no_tasks else images_of_tasks(options.text_encoder)
    try:
        with file_errors():
            _check_options(options, run_config(options.run).model.has_text)
            numbers = write_routing_report(
                options.run, out, request, options.step, options.weights, options.pictures, tasks
            )
    except ConfigError as error:  # the error is in config.yaml of the run, not in the command
        raise RoutingError(str(error)) from error
    header, rows = layer_table(numbers)
    routing_trace.print_table([header, *rows])
    print(f"{out / 'routing.html'} and {out / 'routing.json'}")
    return 0


def _check_options(options: argparse.Namespace, has_text: bool) -> None:
    """Raises CommandError for options of the other kind of model."""
    of_classes = {"--subsets": options.subsets, "--tokens": options.tokens}
    of_texts = {"--text-encoder": options.text_encoder, "--no-tasks": options.no_tasks}
    kind, other, needless = ("texts", "classes", of_classes) if has_text else ("classes", "texts", of_texts)
    if given := [name for name, value in needless.items() if value]:
        raise CommandError(
            f"{', '.join(given)}: only for models of {other}, and {options.run} is one of {kind}; leave it out"
        )
    if options.text_encoder and options.no_tasks:
        raise CommandError("--text-encoder, --no-tasks: the encoder is for the tasks; give one of them")
