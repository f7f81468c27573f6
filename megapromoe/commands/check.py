"""`megapromoe check`: tries an allocation before a run, and names the nodes that are unfit."""

import argparse
from pathlib import Path

from megapromoe.commands.command_line import positive_number
from megapromoe.commands.options import OVERRIDES, config_options, resolve_options, run_option
from megapromoe.planning.cost import memory_per_rank

EPILOG = f"""\
Start it as the run will be started, with the run's settings; alone it tries this machine.
  megapromoe check
  torchrun --nproc-per-node 8 -m megapromoe check --preset promoe_l --run-dir runs/l parallel.ep=4
  srun --kill-on-bad-exit=1 --ntasks-per-node=8 --gpus-per-node=8 megapromoe check \\
      --preset promoe_xl --run runs/xl --bad-nodes runs/xl/preflight/bad-nodes parallel.ep=8
(without --kill-on-bad-exit srun itself would wait for a rank that never ends)
It takes about a minute. Looked at, in this order: do all ranks come; are versions equal; does every GPU
multiply rightly and as fast as the others, and is it healthy; host memory, /dev/shm, limits, settings;
clocks; can every node write in the run directory and see what others wrote, is there room for the
checkpoints; does every node read the same data; do all collectives give right values in every group; how
fast does each pair of nodes talk.

exit codes: 0 passed, perhaps with warnings; 3 the nodes named in --bad-nodes are unfit; 1 something failed
that no single node is to blame for, or the check itself; 2 the command or the config is wrong, or what is
installed: the same would fail on any nodes.
What started the ranks may end with a code of its own (torchrun with 1, srun with that of a rank it had to
kill), so a program should go by --bad-nodes: emptied at the start, it holds names exactly if nodes are unfit.

{OVERRIDES}"""
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    run_option(parser, "the folder of the run, whose file system is tried", required=False)
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="JSON of all that was found; default: preflight/report.json in --run",
    )
    parser.add_argument(
        "--bad-nodes", metavar="FILE", type=Path, help="names of unfit nodes, one a line; empty if there are none"
    )
    parser.add_argument(
        "--expect-gbps",
        metavar="X",
        type=positive_number,
        help="GB/s each way that any two nodes must reach, over all their ranks; default: half of the usual",
    )
    parser.add_argument(
        "--min-free-gib",
        metavar="X",
        type=positive_number,
        help="GiB free in --run; default: what the checkpoints need",
    )
    parser.add_argument(
        "--max-skew",
        metavar="S",
        type=positive_number,
        default=1.0,
        help="seconds between clocks, for a warning; default: 1",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=positive_number,
        default=120.0,
        help="seconds to wait for ranks, and for progress of a check, before naming who is missing; default: 120",
    )


def run(options: argparse.Namespace, launch) -> int:
    config = resolve_options(options, launch.world)

    from megapromoe.checkpoint.disk_space import checkpoint_bytes, saved_bytes
    from megapromoe.preflight.job import Preflight
    from megapromoe.preflight.storage import GIB
    from megapromoe.preflight.verdict import Limits

    if options.min_free_gib is not None:
        free = int(options.min_free_gib * GIB)
    else:  # for what a run that goes on has not saved yet
        free = max(0, checkpoint_bytes(config) - (saved_bytes(options.run) if options.run else 0))
    limits = Limits(
        pair_gbps=options.expect_gbps,
        free_bytes=free,
        skew=options.max_skew,
        host_bytes=memory_per_rank(config, launch.world).host * launch.local_world,
    )
    report = options.report
    if report is None and options.run is not None:
        report = options.run / "preflight" / "report.json"
    return Preflight(config, options.run, launch, limits, options.timeout, report, options.bad_nodes).run()
