"""`megapromoe benchmark`: what our MoE layer, training step and sampling cost, beside other ways to do the same."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import (
    CommandError,
    InterruptedCommand,
    file_errors,
    positive,
    share,
    takes_no_settings,
)

if TYPE_CHECKING:
    from megapromoe.benchmark.layer import Settings
    from megapromoe.benchmark.suite import BenchmarkCase

EPILOG = """\
Contenders take turns in random order, so that a busy machine is unfair to none: ours; a loop over experts with boolean
masks; a dense model of equal FLOPs; batched products of equal capacity; DeepSpeed's MoE with capacity and without
drops. `traffic` starts a few CPU processes and counts messages and bytes against the bound; nothing in it is timed.

The folder --out gets benchmark.json (all rounds), benchmark.md and pictures. A case is written as soon as it is
measured: repeat the command to go on after an interrupt. On a CPU one thread is the default, timed by the time that
the process itself gets; more threads are timed by the wall.

examples:
  megapromoe benchmark all --quick --out runs/benchmark-quick                    # a look, about a minute
  megapromoe benchmark layer --sizes digits s b --out runs/benchmark
  megapromoe benchmark layer --sizes s --experts 4 16 64 256 --routing balanced skewed --out runs/benchmark-experts
  megapromoe benchmark step --sizes l xl --images 32 64 128 --device cuda --out runs/benchmark-gpu \\
      --fill docs/benchmarks.md

exit codes: 0 measured, 1 a measurement failed or the folder holds other figures, 2 the command is wrong"""
JOB = False

# As the library has them, which imports torch.
EXPERIMENTS = ("layer", "step", "sample", "traffic")
SIZES = ("digits", "s", "b", "l", "xl")
ROUTINGS = ("real", "balanced", "skewed")
CONTENDERS = ("ours", "loop", "dense", "joined", "bmm", "deepspeed-capacity", "deepspeed-nodrop")
QUICK = {"sizes": ["digits"], "rounds": 2, "images": [8], "ranks": [2], "steps": 2}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe benchmark layer|step|sample|traffic|all [options]"
    takes_no_settings(parser)
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
    add("--dry-run", action="store_true", help="list the cases and end")


def run(options: argparse.Namespace, launch: None) -> int:
    if options.quick:
        vars(options).update(QUICK)
    if options.compile and options.experiment != "step":
        raise CommandError(f"--compile {options.experiment}: only `step` is compiled; leave the option out")
    import torch  # takes seconds to import

    from megapromoe.benchmark.layer import Settings
    from megapromoe.benchmark.suite import cases

    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise CommandError("--device cuda: torch finds no GPU here; leave the option out, or use --device cpu")
    device = options.device or ("cuda" if cuda else "cpu")
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    settings = Settings(
        device=torch.device(device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
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
    wanted = cases(experiments, options.sizes, options.experts, options.images, options.routing, options.ranks, device)
    for case in wanted:
        case.config.layout(1)  # every size and number of experts is checked before the first is measured
    if options.dry_run:
        print("\n".join(case.key for case in wanted))
        return 0
    try:
        with file_errors():
            _measure(options, wanted, settings)
    except KeyboardInterrupt as error:
        raise InterruptedCommand("interrupted; repeat the command to go on") from error
    return 0


def _measure(options: argparse.Namespace, wanted: Sequence[BenchmarkCase], settings: Settings) -> None:
    from megapromoe.benchmark import suite
    from megapromoe.benchmark.report import fill, write_report
    from megapromoe.work_progress import Progress

    command = shlex.join(["megapromoe", *options.words])
    with Progress(None, "case", "measuring") as progress:

        def starts(case: BenchmarkCase) -> None:
            progress.note(case.key)
            progress.update()

        document = suite.run(wanted, settings, options.out, command, options.again, starts)
    files = write_report(document, options.out)
    if options.fill:
        fill(options.fill, document, options.out)
        files.append(options.fill)
    print("\n".join(str(file) for file in files))
