"""`megapromoe benchmark`: compares the MoE layer, training step and sampling with other implementations."""

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
    whole_number,
)

if TYPE_CHECKING:
    from megapromoe.benchmark.layer import Settings
    from megapromoe.benchmark.suite import BenchmarkCase

EPILOG = """\
--implementations: ours; loop, a loop over experts with boolean masks; dense, a dense model of equal FLOPs; joined,
ours with the shared and the unconditional expert in one MLP; bmm, batched products with equal capacity;
deepspeed-capacity and deepspeed-nodrop, DeepSpeed's MoE. Each round times all of them in random order, so that load on
the machine affects all alike. `traffic` starts a few CPU processes, counts messages and bytes, and compares them with
the lower bound; it measures no time.

The command writes benchmark.json (all rounds), benchmark.md and plots into --out. Each case is written as soon as it is
measured: repeat the command to continue after an interruption. On a CPU the default is one thread, measured in CPU time
of the process; with more threads wall time is measured.

examples:
  megapromoe benchmark all --quick --out runs/benchmark-quick                    # a test, about a minute
  megapromoe benchmark layer --sizes digits s b --out runs/benchmark
  megapromoe benchmark layer --sizes s --experts 4 16 64 256 --routing balanced skewed --out runs/benchmark-experts
  megapromoe benchmark layer --sizes b --trace runs/promoe_b --routing balanced skewed recorded --out runs/replayed
  megapromoe benchmark step --sizes l xl --batch 32 64 128 --device cuda --out runs/benchmark-gpu \\
      --fill docs/benchmarks.md

exit codes: 0 measured, 1 a measurement failed or the folder holds results of other settings, 2 the command is wrong"""
JOB = False

# Copies of the names in megapromoe/benchmark, whose import needs torch.
EXPERIMENTS = ("layer", "step", "sample", "traffic")
SIZES = ("digits", "s", "b", "l", "xl")
ROUTINGS = ("real", "balanced", "skewed")
RECORDED = "recorded"
CONTENDERS = ("ours", "loop", "dense", "joined", "bmm", "deepspeed-capacity", "deepspeed-nodrop")
QUICK = {"sizes": ["digits"], "rounds": 2, "batch": [8], "ranks": [2], "steps": 2}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe benchmark layer|step|sample|traffic|all [options]"
    takes_no_settings(parser)
    add = parser.add_argument
    add("experiment", choices=(*EXPERIMENTS, "all"), help="what to measure")
    add(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=["digits", "s"],
        help="model sizes (presets) to measure; default: digits s",
    )
    add(
        "--experts",
        nargs="+",
        type=positive,
        default=[],
        metavar="E",
        help="numbers of routed experts; default: as in the preset",
    )
    add(
        "--routing",
        nargs="+",
        choices=(*ROUTINGS, RECORDED),
        default=None,
        help="assignment of tokens to experts; default: all of them, `recorded` only with --trace",
    )
    add(
        "--trace",
        type=Path,
        metavar="RUN",
        help="a run with a routing trace, whose load the routing `recorded` replays (docs/routing.md)",
    )
    add("--trace-step", type=positive, metavar="N", help="the recorded step to replay; default: the last one")
    add(
        "--trace-block",
        type=whole_number(0),
        metavar="B",
        help="the block that `layer` and `traffic` replay; default: the one with the largest fullest expert",
    )
    add(
        "--implementations",
        nargs="+",
        choices=CONTENDERS,
        default=None,
        help="implementations to measure; default: all, for whole models: ours loop dense",
    )
    add(
        "--batch",
        nargs="+",
        type=positive,
        default=[],
        metavar="B",
        help="images in a micro-batch; default: depends on size and device",
    )
    add(
        "--null",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of null-class images, rounded to whole images; default: 0.1",
    )
    add(
        "--rounds",
        type=positive,
        default=7,
        metavar="N",
        help="rounds, each of which measures every implementation once; default: 7",
    )
    add("--steps", type=positive, default=4, metavar="N", help="number of sampling steps; default: 4")
    add(
        "--ranks",
        nargs="+",
        type=positive,
        default=[2, 4],
        metavar="N",
        help="numbers of processes for `traffic`; default: 2 4",
    )
    add("--dtype", choices=("fp32", "bf16"), help="data type; default: fp32 on a CPU, bf16 on a GPU")
    add("--device", choices=("cpu", "cuda"), help="device; default: cuda if a GPU is available")
    add("--threads", type=positive, default=1, metavar="N", help="number of CPU threads; default: 1")
    add(
        "--compile",
        action="store_true",
        help="`step`: measure every implementation, also dense, with train.compile=true",
    )
    add(
        "--capture",
        action="store_true",
        help="with --compile on a GPU: measure the step as a CUDA graph, whose kernels the host does not issue",
    )
    add("--seed", type=int, default=0, help="seed of tokens, weights and the order in a round; default: 0")
    add(
        "--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="output folder; default: runs/benchmark"
    )
    add("--fill", type=Path, metavar="PAGE", help="also insert the tables into this Markdown page, between its markers")
    add(
        "--again",
        action="store_true",
        help="measure all cases again, also those in --out; results of other settings are removed",
    )
    add(
        "--quick",
        action="store_true",
        help="digits, batch 8, 2 rounds: a test that everything runs; the timings are not meaningful",
    )
    add("--dry-run", action="store_true", help="list the cases without measuring them")


def run(options: argparse.Namespace, launch: None) -> int:
    if options.quick:
        vars(options).update(QUICK)
    if options.compile and options.experiment != "step":
        raise CommandError(f"--compile {options.experiment}: only `step` can be compiled; remove the option")
    if options.capture and not options.compile:
        raise CommandError("--capture: only a compiled step can be captured; add --compile")
    routings = options.routing or [*ROUTINGS, *[RECORDED] * (options.trace is not None)]
    if (RECORDED in routings) != (options.trace is not None):
        raise CommandError("--routing recorded, --trace: the trace is what it replays; give both or none of them")
    if options.trace is None and (options.trace_step is not None or options.trace_block is not None):
        raise CommandError("--trace-step, --trace-block: choose what to replay; give --trace as well")
    import torch  # takes seconds to import

    from megapromoe.benchmark.layer import Settings
    from megapromoe.benchmark.suite import cases, replay

    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise CommandError("--device cuda: torch has no GPU on this machine; remove the option, or use --device cpu")
    device = options.device or ("cuda" if cuda else "cpu")
    if options.capture and device != "cuda":
        raise CommandError("--capture: needs a GPU; remove the option")
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    settings = Settings(
        device=torch.device(device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        threads=options.threads,
        rounds=options.rounds,
        images=1,
        contenders=tuple(options.implementations or ()),
        null=options.null,
        seed=options.seed,
        sample_steps=options.steps,
        compile=options.compile,
        capture=options.capture,
    )
    experiments = EXPERIMENTS if options.experiment == "all" else (options.experiment,)
    wanted = cases(experiments, options.sizes, options.experts, options.batch, routings, options.ranks, device)
    for case in wanted:
        case.config.layout(1)  # checks every size and number of experts before the first measurement
    if options.trace is not None:
        settings = replay(settings, wanted, options.trace, options.trace_step, options.trace_block)
    if options.dry_run:
        print("\n".join(case.key for case in wanted))
        return 0
    try:
        with file_errors():
            _measure(options, wanted, settings)
    except KeyboardInterrupt as error:
        raise InterruptedCommand("interrupted; repeat the command to continue") from error
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
