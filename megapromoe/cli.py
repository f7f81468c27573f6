"""The command line: `megapromoe COMMAND`. Each command is a file of `commands/`.

Only the module of the command that runs is imported, and it imports torch and deepspeed where it needs them, so that
help and `show` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from megapromoe import __version__
from megapromoe.commands.command_line import SETTING, checked_output
from megapromoe.errors import ExitCode, UserError

if TYPE_CHECKING:
    from megapromoe.distributed.launch_environment import LaunchEnvironment

# Name and summary of each command, in the order of the help; `megapromoe.commands.NAME` is its module.
COMMANDS = {
    "show": "print presets, a resolved config, its size and its layout",
    "plan": "find the best layout for some GPUs, and say what it would cost",
    "check": "try the machines before a run, and name the bad node",
    "encode": "encode a folder of images into latents, or import published ones",
    "data": "check, show or time a folder of latents",
    "train": "train a model, or continue a run",
    "sample": "draw images with a trained model",
    "evaluate": "measure how good drawn images are: FID and its kin",
    "routing": "show what the experts of a run learnt, as one HTML page",
    "convert": "convert a checkpoint between formats, bit by bit",
    "inspect": "show a checkpoint of any format, or how two of them differ",
    "upcycle": "make a ProMoE from a trained model",
    "study": "plan, run and compare many trainings from one recipe",
    "benchmark": "time our MoE layer, step and sampling beside others",
    "launchers": "write the job scripts into a folder",
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

exit codes: 0 done, 1 the run failed, 2 the command, the config, a path, the launcher or what is installed is wrong
(repeating cannot help), 3 `check` found unfit nodes, 75 stopped by a signal or Ctrl-C and saved (repeat the command),
76 a rank hung, 130 interrupted and not saved, 141 nobody reads the output
`megapromoe COMMAND --help` tells more of a command."""


class Command(Protocol):
    """A module of `commands/`."""

    EPILOG: str  # of its help
    JOB: bool  # every rank of a job runs it

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options."""

    def run(self, options: argparse.Namespace, launch: LaunchEnvironment | None) -> int:
        """Runs it and returns the exit code; `launch` is this rank, None unless `JOB`. Raises UserError."""


def load(name: str) -> Command:
    """Imports the module of a command."""
    return cast(Command, importlib.import_module(f"megapromoe.commands.{name}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code, as `--help` lists them."""
    try:
        with checked_output():
            options = parse(sys.argv[1:] if argv is None else argv)
            command = load(options.command)
            if not command.JOB:
                return command.run(options, None)
        return _as_a_rank(command, options)
    except UserError as error:
        if str(error):
            _print_error(f"megapromoe: {error}")
        return error.exit_code
    except ImportError as error:
        if (message := missing_package(error)) is None:
            raise
        _print_error(f"megapromoe: {message}")
        return ExitCode.MISCONFIGURED
    except KeyboardInterrupt:
        _print_error("megapromoe: interrupted")
        return ExitCode.INTERRUPTED


def missing_package(error: ImportError) -> str | None:
    """What to install, if an import failed for a package that is not there or not whole; None if it is a bug."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "megapromoe":
        return None
    package = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}.get(name, name)
    where = f"in the environment that this process runs in, {sys.prefix}"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {name} is not installed {where}; install it there: pip install {package}"
    if error.path and error.path.endswith(".so"):  # a library that it needs is missing or of another version
        return f"{name}, {where}, does not load ({error}); install it there again, or the library that it misses"
    return None


def _print_error(message: str) -> None:
    """Prints on stderr; where that is a terminal that is gone, or a file on a full disk, the exit code must do."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Words that argparse refuses end the process with exit code 2.

    Beside the command's own options, the namespace has
        overrides: words of the form section.key=value, which may stand anywhere, also after options that take a list;
            then words that are no option, which the configuration refuses with the rest of its problems.
        passed_on: unknown words, of a command that hands them to another program.
        words: the whole command line.
    """
    settings = [word for word in words if SETTING.match(word)]
    others = [word for word in words if not SETTING.match(word)]
    parser = _parser(next((word for word in others if word in COMMANDS), None))
    options, unknown = parser.parse_known_args(others)
    options.words = list(words)
    options.passed_on, unknown = (unknown, []) if options.passes_on else ([], unknown)
    if settings and options.no_settings:
        parser.error(f"{settings[0]}: {options.no_settings}")
    if wrong := [word for word in unknown if options.no_settings or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}; see megapromoe {options.command} --help")
    options.overrides = [*settings, *unknown]
    return options


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the chosen one alone."""
    parser = argparse.ArgumentParser(
        prog="megapromoe",
        description="Expert-parallel training of ProMoE diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megapromoe {__version__}")
    # The deepspeed launcher puts it before the command; launch_environment.py reads the same from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            usage=f"megapromoe {name} [options] [section.key=value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(no_settings=None, passes_on=False)  # a command may change them
        if name == chosen:
            command = load(name)
            added.epilog = command.EPILOG
            command.arguments(added)
    return parser


def _as_a_rank(command: Command, options: argparse.Namespace) -> int:
    """Runs a command as one rank of a job; of an error that all ranks raise, rank 0 alone prints the message."""
    import logging

    from megapromoe.distributed import launch_environment
    from megapromoe.distributed.rank_output import ignoring_output_errors

    launch = launch_environment.detect()
    with ignoring_output_errors():
        log = logging.getLogger("megapromoe")
        log.setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
        return _run_rank(command, options, launch)


def _run_rank(command: Command, options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    from megapromoe.distributed import process_end

    try:
        return command.run(options, launch)
    except UserError as error:
        if launch.rank == 0 or not error.on_all_ranks:
            rank = f", rank {launch.rank}" if launch.rank else ""
            _print_error(f"megapromoe{rank}: {error}")
        else:
            time.sleep(GRACE)
        return error.exit_code
    except ImportError as error:
        if missing_package(error) is None and launch.world > 1:
            process_end.exit_with_traceback(error)
        raise  # all ranks have the same packages, and end with the same message
    except Exception as error:
        if launch.world > 1:
            process_end.exit_with_traceback(error)
        raise
