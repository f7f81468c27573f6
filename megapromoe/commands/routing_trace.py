"""The action `trace` of `megapromoe routing`: the load of the experts over the recorded steps of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megapromoe.commands.command_line import CommandError, comma_separated, file_errors, whole_number
from megapromoe.imports import uncollected

OF_TRACE = ("from_step", "to_step", "routes", "route_steps")
OF_ROUTES = (
    "route_steps",
    "num_images",
    "levels",
    "layers",
    "weights",
)  # the report has all but the first
OF_REPORT = ("subsets", "text_encoder", "no_tasks", "tokens", "singular_vectors", "step", "pictures")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the action."""
    add = parser.add_argument
    add("--from-step", type=whole_number(0), metavar="N", help="trace: the first recorded step; default: all")
    add("--to-step", type=whole_number(0), metavar="N", help="trace: the last recorded step; default: all")
    add("--routes", action="store_true", help="trace: also the tokens that changed their expert, on fixed images")
    add(
        "--route-steps",
        type=comma_separated(int),
        metavar="N,N,...",
        help="trace --routes: steps of checkpoints or snapshots; default: all that have the weights",
    )
    parser.set_defaults(defaults={name: parser.get_default(name) for name in (*OF_TRACE, *OF_ROUTES, *OF_REPORT)})


def check_options(options: argparse.Namespace) -> None:
    """Raises CommandError for options of the other action."""
    given = [name for name, default in options.defaults.items() if getattr(options, name) != default]
    if options.action != "trace":
        wrong, rule = [name for name in given if name in OF_TRACE], "is for megapromoe routing trace"
    elif wrong := [name for name in given if name in OF_REPORT]:
        rule = "is for the report, megapromoe routing without trace"
    else:
        wrong, rule = [name for name in given if name in OF_ROUTES and not options.routes], "needs --routes"
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise CommandError(f"{flags}: {rule}; leave it out")


def run(options: argparse.Namespace) -> int:
    """Prints the tables and writes the files."""
    with uncollected():
        from megapromoe.config.options import ConfigError
        from megapromoe.io import write_bytes, write_json
        from megapromoe.recorded_routes import ROUTES_FILE, write_routes
        from megapromoe.routing_analysis.figures import png
        from megapromoe.routing_analysis.fixed_tokens import routes_of_run
        from megapromoe.routing_analysis.observe import LEVELS, RoutingError, chosen_layers
        from megapromoe.routing_analysis.report import plain
        from megapromoe.routing_analysis.trace import load_series, numbers_of, tables_of
        from megapromoe.routing_analysis.trace_figure import trace_figure
        from megapromoe.sampling.run_model import run_config

    out = options.out or options.run / "routing"
    try:
        with file_errors():
            config = run_config(options.run)
            chosen_layers(config, None, LEVELS)
            series = load_series(options.run, options.from_step or 0, options.to_step)
            routes = []
            if options.routes:
                settings = options.route_steps, options.weights, options.num_images, options.levels, options.layers
                routes = routes_of_run(options.run, config, *settings)
                write_routes(out / ROUTES_FILE, routes)
            numbers = numbers_of(series, routes)
            figure = trace_figure(series, numbers.get("drift", ()))
            write_json(out / "trace.json", plain({"run": options.run.name, **numbers}), indent=1, parents=True)
            write_bytes(out / "trace.png", png(figure))
    except ConfigError as error:  # the error is in config.yaml of the run, not in the command
        raise RoutingError(str(error)) from error
    steps = f"{numbers['records']} records, steps {numbers['first_step']} to {numbers['last_step']}"
    layouts = ", then ".join(f"{layout['data_ranks']} data ranks, ep {layout['ep']}" for layout in numbers["layouts"])
    print(f"{steps}; {layouts}")
    for table in tables_of(numbers):
        print_table(table)
    files = [ROUTES_FILE] * bool(routes) + ["trace.json", "trace.png"]
    print(", ".join(str(out / name) for name in files))
    return 0


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, the first of which is the header, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
