"""Shows what the experts of a run learnt: one HTML page with pictures and definitions, and the numbers as JSON.

    python tools/plot_routing.py --run DIR [options]

Labelled images of the training data, at a few noise levels, are shown to the run's averaged weights, and what its
routers answer is measured: expert by class, load over layers and noise levels, subsets of classes, token-to-expert maps
over images, t-SNE of tokens by expert and by class, distances between and within classes, similarity of the router's
vectors, diversity of the experts' weights. The page explains each measure.

A file of subsets (YAML or JSON) maps names to classes:
    animals: [2, 3, "5-7"]
    vehicles: [0, 1, 8, 9]
Without it each class is a subset, or, of more than 20, two random subsets of up to 200 classes are compared.

examples:
  plot_routing.py --run runs/digits
  plot_routing.py --run runs/promoe_l --images 2000 --layers 3,11,19 --levels 0.1,0.3,0.5,0.7,0.9
  plot_routing.py --run runs/promoe_l --subsets animals_and_vehicles.yaml --out reports/animals --pictures

exit codes: 0 done, 1 the run cannot be read or has no routing, 2 the command is wrong
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = arguments(argv)

    # After the arguments: torch takes seconds to import.
    from megapromoe.checkpoint.format import CheckpointError
    from megapromoe.config.class_groups import ClassGroupError
    from megapromoe.config.options import ConfigError
    from megapromoe.data.datasets import DatasetError
    from megapromoe.diffusion.image_grid import SampleError
    from megapromoe.routing_analysis.observe import RoutingError
    from megapromoe.routing_analysis.report import Request, layer_table, write_routing_report

    out = options.out or options.run / "routing"
    request = Request(
        options.images, options.levels, options.layers, options.subsets, options.tokens, options.singular_vectors
    )
    try:
        numbers = write_routing_report(options.run, out, request, options.step, options.weights, options.pictures)
    except (ClassGroupError, RoutingError) as error:
        print(f"plot_routing: {error}", file=sys.stderr)
        return 2 if isinstance(error, ClassGroupError) else 1
    except (ConfigError, SampleError, CheckpointError, DatasetError, OSError) as error:
        print(f"plot_routing: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("plot_routing: interrupted", file=sys.stderr)
        return 1
    header, rows = layer_table(numbers)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    print(f"{out / 'routing.html'} and {out / 'routing.json'}")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: routing in the run's folder")
    parser.add_argument("--images", type=whole(1), default=500, metavar="N", help="of the data; default: 500")
    parser.add_argument("--layers", type=several(int), metavar="B,B,...", help="blocks; default: all with experts")
    parser.add_argument(
        "--levels", type=several(float), default=(0.1, 0.5, 0.9), metavar="Q,Q,...",
        help="noise levels, as quantiles of those of training; default: 0.1,0.5,0.9. Tokens are of the middle one",
    )  # fmt: skip
    parser.add_argument("--subsets", type=Path, metavar="FILE", help="subsets of classes to compare")
    parser.add_argument(
        "--tokens", type=whole(10, 2000), default=2000, metavar="N", help="of t-SNE; default, most: 2000"
    )
    parser.add_argument(
        "--singular-vectors", type=whole(0), default=0, metavar="K", help="of the overlap; default, 0: channels / 8"
    )
    parser.add_argument("--step", type=whole(0), metavar="N", help="which checkpoint; default: the latest")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged or not; default: ema")
    parser.add_argument("--pictures", action="store_true", help="also write each picture as a PNG file")
    return parser.parse_args(argv)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number in a range."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or most is not None and int(text) > most:
            limits = f"of at least {least}" if most is None else f"in {least}..{most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {text!r}")
        return int(text)

    return read


def several(kind: type) -> Callable[[str], tuple]:
    """An argparse type: numbers with commas between."""

    def read(text: str) -> tuple:
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None

    return read


if __name__ == "__main__":
    sys.exit(main())
