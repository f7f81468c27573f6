"""Measures what our MoE layer, training step and sampling cost, beside other ways to do the same.

    python tools/benchmark.py layer|step|sample|traffic|all [options]

Contenders take turns in random order, so that a busy machine is unfair to none: ours; a loop over experts with boolean
masks; a dense model of equal FLOPs; batched products of equal capacity; DeepSpeed's MoE with capacity and without
drops. `traffic` starts a few CPU processes and counts messages and bytes against the bound; nothing in it is timed.

The folder --out gets benchmark.json (all rounds), benchmark.md and pictures. A scene is written as soon as it is
measured: repeat the command to go on after an interrupt. On a CPU one thread is the default, timed by the time that
the process itself gets; more threads are timed by the wall.

examples:
  benchmark.py all --quick --out runs/benchmark-quick                    # a look, about a minute
  benchmark.py layer --sizes digits s b --out runs/benchmark
  benchmark.py layer --sizes s --experts 4 16 64 256 --routing balanced skewed --out runs/benchmark-experts
  benchmark.py step --sizes l xl --images 32 64 128 --device cuda --out runs/benchmark-gpu --fill docs/benchmarks.md

exit codes: 0 measured, 1 a measurement failed or the folder holds other figures, 2 the command is wrong
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXPERIMENTS = ("layer", "step", "sample", "traffic")
SIZES = ("digits", "s", "b", "l", "xl")
ROUTINGS = ("real", "balanced", "skewed")
CONTENDERS = ("ours", "loop", "dense", "joined", "bmm", "deepspeed-capacity", "deepspeed-nodrop")
QUICK = {"sizes": ["digits"], "rounds": 2, "images": [8], "ranks": [2], "steps": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = arguments(words)

    import torch  # after the arguments: it takes seconds to import

    from megapromoe.benchmark.layer import BenchmarkError, Settings
    from megapromoe.benchmark.suite import scenes
    from megapromoe.config.options import ConfigError

    try:
        device = device_of(options.device, torch)
        if options.compile and options.experiment != "step":
            raise ValueError(f"--compile {options.experiment}: only `step` is compiled; leave the option out")
        settings = Settings(
            device=torch.device(device),
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype or usual_dtype(device)],
            threads=options.threads,
            rounds=options.rounds,
            images=1,
            contenders=tuple(options.contenders or ()),
            null=options.null,
            seed=options.seed,
            sample_steps=options.steps,
            compile=options.compile,
        )
        experiments = EXPERIMENTS if options.experiment == "all" else (options.experiment,)
        wanted = scenes(
            experiments, options.sizes, options.experts, options.images, options.routing, options.ranks, device
        )
        for scene in wanted:
            scene.config.layout(1)  # every size and number of experts is checked before the first is measured
    except (ConfigError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print("\n".join(scene.key for scene in wanted))
        return 0
    try:
        measure(options, wanted, settings, shlex.join(["python", "tools/benchmark.py", *words]))
    except (BenchmarkError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmark: interrupted; repeat the command to go on", file=sys.stderr)
        return 1
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("experiment", choices=(*EXPERIMENTS, "all"), help="what to measure")
    add("--sizes", nargs="+", choices=SIZES, default=["digits", "s"], help="presets; default: digits s")
    add("--experts", nargs="+", type=positive, default=[], metavar="E", help="routed experts; default: the preset's")
    add("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="who visits whom; default: all three")
    add(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=None,
        help="default: all; of whole models: ours loop dense",
    )
    add(
        "--images", nargs="+", type=positive, default=[], metavar="B", help="micro-batches; default: by size and device"
    )
    add("--null", type=share, default=0.1, metavar="SHARE", help="images without a class; default: 0.1, rounded")
    add("--rounds", type=positive, default=7, metavar="N", help="turns of each contender; default: 7")
    add("--steps", type=positive, default=4, metavar="N", help="steps of the sampler; default: 4")
    add("--ranks", nargs="+", type=positive, default=[2, 4], metavar="N", help="processes of `traffic`; default: 2 4")
    add("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--threads", type=positive, default=1, metavar="N", help="of the CPU; default: 1")
    add("--compile", action="store_true", help="of `step`: train.compile=true for every contender, dense too")
    add("--seed", type=int, default=0, help="of tokens, weights and the order of turns; default: 0")
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="default: runs/benchmark")
    add("--fill", type=Path, metavar="PAGE", help="also put the tables into this Markdown page, between its marks")
    add("--again", action="store_true", help="measure also what --out holds; figures of other settings go")
    add("--quick", action="store_true", help="digits, 8 images, 2 rounds: see that all runs; the figures mean little")
    add("--dry-run", action="store_true", help="list the scenes and end")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    return options


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def device_of(asked: str | None, torch) -> str:
    """The device to measure on. Raises ValueError for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave the option out, or use --device cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def usual_dtype(device: str) -> str:
    return "bf16" if device == "cuda" else "fp32"


def measure(options: argparse.Namespace, wanted: list, settings, command: str) -> None:
    from tqdm import tqdm

    from megapromoe.benchmark.report import fill, write_report
    from megapromoe.benchmark.suite import run

    with tqdm(unit="scene", disable=None) as bar:

        def starts(scene) -> None:
            bar.set_description(scene.key)
            bar.update()

        document = run(wanted, settings, options.out, command, options.again, starts)
    files = write_report(document, options.out)
    if options.fill:
        fill(options.fill, document, options.out)
        files.append(options.fill)
    print("\n".join(str(file) for file in files))


if __name__ == "__main__":
    sys.exit(main())
