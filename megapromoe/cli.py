"""The command line: `megapromoe COMMAND`. Each command is a file of `commands/`.

Torch and deepspeed are imported by the command that needs them, so that help and `show` are there at once.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence

from megapromoe import __version__
from megapromoe.commands import check, data, evaluate, plan, sample, show, train
from megapromoe.errors import UserError

COMMANDS = {
    **{"show": show, "plan": plan, "check": check, "data": data},
    **{"train": train, "sample": sample, "evaluate": evaluate},
}
# Once a rank has failed, launchers end the others: those that leave the message to rank 0 give it so many seconds.
GRACE = 5.0

_EXAMPLES = """\
examples:
  megapromoe show                                          the presets
  megapromoe show --preset promoe_b --ranks 8 parallel.ep=8
  megapromoe train --run runs/digits                       digits, one process
  torchrun --nproc-per-node 4 -m megapromoe train --run-dir runs/digits parallel.tp=2 parallel.ep=2
  megapromoe sample --run runs/digits --class 3 --guidance 1.5 --out grid.png
  megapromoe plan --preset promoe_xl --nodes 4 --gpu h100  layouts, memory and hours on a cluster

exit codes: 0 done, 1 the run failed, 2 the command, the config or the launcher is wrong, 3 `check` found unfit
nodes, 75 stopped by a signal and saved (repeat the command), 76 a rank hung, 130 interrupted
`megapromoe COMMAND --help` tells more of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code, as `--help` lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Overrides may stand anywhere, also after options that take a list.
    overrides = [a for a in arguments if re.match(r"\w+\.\w+=", a)]
    parser = _parser()
    options, rest = parser.parse_known_args([a for a in arguments if not re.match(r"\w+\.\w+=", a)])
    if unknown := [a for a in rest if a.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see megapromoe {options.command} --help")
    options.overrides = overrides + rest
    try:
        command = COMMANDS[options.command]
        return _as_a_rank(command, options) if command.JOB else command.run(options, None)
    except UserError as error:
        print(f"megapromoe: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("megapromoe: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megapromoe",
        description="Expert-parallel training of ProMoE diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megapromoe {__version__}")
    # The deepspeed launcher puts it before the command; runtime.py reads the same from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.arguments(
            commands.add_parser(
                name,
                help=command.SUMMARY,
                description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
                usage=f"megapromoe {name} [options] [section.key=value ...]",
                epilog=command.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    return parser


def _as_a_rank(command, options: argparse.Namespace) -> int:
    """Runs a command as one rank of a job; an error that all ranks meet is told by rank 0 alone."""
    from megapromoe.distributed import runtime

    launch = runtime.detect()
    log = logging.getLogger("megapromoe")
    log.setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    try:
        return command.run(options, launch)
    except UserError as error:
        if launch.rank == 0 or not error.on_all_ranks:
            rank = f", rank {launch.rank}" if launch.rank else ""
            print(f"megapromoe{rank}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(GRACE)
        return error.exit_code
    except Exception as error:
        if launch.world > 1:
            runtime.leave(error)
        raise
