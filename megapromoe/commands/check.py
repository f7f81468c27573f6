"""`megapromoe check`: tests the nodes of an allocation before a run, and reports the faulty ones."""

import argparse
from pathlib import Path

from megapromoe.commands.command_line import positive_number
from megapromoe.commands.options import OVERRIDES, config_options, resolve_options, run_option
from megapromoe.planning.cost import memory_per_rank

EPILOG = f"""\
Start it with the launcher and the settings of the run. Without a launcher it tests this machine.
  megapromoe check
  torchrun --nproc-per-node 8 -m megapromoe check --preset promoe_l --run-dir runs/l parallel.ep=4
  srun --kill-on-bad-exit=1 --nodes=4 --ntasks=32 --ntasks-per-node=8 --gpus-per-node=8 megapromoe check \\
      --preset promoe_xl --run-dir runs/xl --bad-nodes runs/xl/preflight/bad-nodes parallel.ep=8
(without --kill-on-bad-exit srun would wait for a rank that does not exit; without --ntasks it would take the number
of tasks of the allocation)
It takes about a minute, and checks in this order: all ranks connect; versions are equal; every GPU computes
correct products at the speed of the others, and reports no errors; host memory, /dev/shm, limits, settings;
clocks; every node can write to the run directory and read what others wrote, and the disk has room for the
checkpoints; every node reads the same data; all collectives return correct values in every group; the
bandwidth between each pair of nodes.

exit codes: 0 passed, possibly with warnings; 3 the nodes in --bad-nodes are faulty; 1 a check failed without
a single faulty node, or the command itself failed; 2 the command, the config or the installation is wrong,
which would fail on any nodes.
The launcher may exit with another code (torchrun with 1, srun with that of a rank it killed), so programs
should read --bad-nodes: it is emptied at the start, and contains names exactly if nodes are faulty.

{OVERRIDES}"""
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    run_option(parser, "the folder of the run, whose file system is tested", required=False)
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write all results to this JSON file; default: preflight/report.json in --run-dir",
    )
    parser.add_argument(
        "--bad-nodes",
        metavar="FILE",
        type=Path,
        help="write the names of faulty nodes to this file, one per line; empty if there are none",
    )
    parser.add_argument(
        "--expect-gbs",
        metavar="X",
        type=positive_number,
        help="GB/s in each direction that any two nodes must reach, over all their ranks; default: half of the usual",
    )
    parser.add_argument(
        "--min-free-gib",
        metavar="X",
        type=positive_number,
        help="GiB of disk space that must be free in --run-dir; default: the space that the checkpoints need",
    )
    parser.add_argument(
        "--max-skew",
        metavar="S",
        type=positive_number,
        default=1.0,
        help="seconds by which clocks may differ without a warning; default: 1",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=positive_number,
        default=120.0,
        help="seconds to wait for ranks to connect and for a check to progress before missing ranks are reported;"
        " default: 120",
    )


def run(options: argparse.Namespace, launch) -> int:
    config = resolve_options(options, launch.world)

    from megapromoe.checkpoint.disk_space import checkpoint_bytes, saved_bytes
    from megapromoe.preflight.job import Preflight
    from megapromoe.preflight.storage import GIB
    from megapromoe.preflight.verdict import Limits

    if options.min_free_gib is not None:
        free = int(options.min_free_gib * GIB)
    else:  # without the space that checkpoints of a continued run already take
        free = max(0, checkpoint_bytes(config) - (saved_bytes(options.run) if options.run else 0))
    limits = Limits(
        pair_gbps=options.expect_gbs,
        free_bytes=free,
        skew=options.max_skew,
        host_bytes=memory_per_rank(config, launch.world).host * launch.local_world,
    )
    report = options.report
    if report is None and options.run is not None:
        report = options.run / "preflight" / "report.json"
    return Preflight(config, options.run, launch, limits, options.timeout, report, options.bad_nodes).run()
