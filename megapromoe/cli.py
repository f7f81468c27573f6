"""The command line: `megapromoe COMMAND`. Each command is a module of `commands/`.

Only the module of the selected command is imported, and it imports torch and deepspeed inside the functions that need
them, because these imports take seconds: `--help` and `show` do not need them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from megapromoe import __version__
from megapromoe.commands.command_line import SETTING, checked_output
from megapromoe.commands.renamed_flags import renamed
from megapromoe.errors import ExitCode, UserError
from megapromoe.imports import end_uncollected

if TYPE_CHECKING:
    from megapromoe.distributed.launch_environment import LaunchEnvironment

# Name and summary of each command, in the order of the help; `megapromoe.commands.NAME` is its module.
COMMANDS = {
    "show": "print presets, a resolved config, its size and its layout",
    "plan": "find the best parallel layout for given GPUs, and estimate memory, time and cost",
    "check": "test the machines before a run, and report the faulty nodes",
    "encode": "encode a folder of images into latents, or import published latents",
    "data": "check, show or benchmark a folder of latents",
    "train": "train a model, or continue a run",
    "sample": "sample images from a trained model",
    "evaluate": "measure the quality of sampled images: FID and related metrics",
    "routing": "report what the experts of a run have learnt, as one HTML page",
    "convert": "convert a checkpoint between formats, without changing any value",
    "inspect": "show a checkpoint of any format, or how two of them differ",
    "upcycle": "initialize a ProMoE model from a trained model",
    "superclasses": "group classes by WordNet, for the classification router",
    "study": "plan, run and compare many training runs from one recipe",
    "benchmark": "compare the speed of the MoE layer, the training step and sampling with other implementations",
    "launchers": "write the job scripts into a folder",
}
# Seconds that other ranks wait at most before they exit with an error that rank 0 prints. Launchers end all ranks when
# one has failed, so an earlier exit could prevent the message.
GRACE = 5.0
POLL = 0.05  # seconds between two checks for a signal

_EXAMPLES = """\
examples:
  megapromoe show                                          the presets
  megapromoe show --preset promoe_b --ranks 8 parallel.ep=8
  megapromoe train --run-dir runs/digits                   digits, one process
  torchrun --nproc-per-node 4 -m megapromoe train --run-dir runs/digits parallel.tp=2 parallel.ep=2
  megapromoe sample --run-dir runs/digits --class 3 --guidance 1.5 --out grid.png
  megapromoe plan --preset promoe_xl --nodes 4 --gpu h100  layouts, memory and hours on a cluster

exit codes: 0 done, 1 the run failed, 2 the command, the config, a path, the launcher or the installation is wrong
(repeating the command cannot help), 3 `check` reports faulty nodes, 75 stopped by a signal or Ctrl-C after a save
(repeat the command), 76 a rank hung, 130 interrupted without a save, 141 the reader of the output has closed it
`megapromoe COMMAND --help` explains a command."""


class Command(Protocol):
    """A module of `commands/`."""

    EPILOG: str  # text after the options in its help
    JOB: bool  # whether every rank of a job runs the command

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of the command."""

    def run(self, options: argparse.Namespace, launch: LaunchEnvironment | None) -> int:
        """Runs the command and returns the exit code; `launch` is this rank, None unless `JOB`. Raises UserError."""


def load(name: str) -> Command:
    """Imports the module of a command."""
    return cast(Command, importlib.import_module(f"megapromoe.commands.{name}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code, as `--help` lists them."""
    end_uncollected()
    try:
        with checked_output():
            options = parse(sys.argv[1:] if argv is None else argv)
            command = load(options.command)
            if not command.JOB:
                _print_notices(options)
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
    """How to repair the installation if a package is missing or does not load; None if the import error is a bug."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "megapromoe":
        return None
    package = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}.get(name, name)
    where = f"in the environment that this process runs in, {sys.prefix}"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {name} is not installed {where}; install it there: pip install {package}"
    if error.path and error.path.endswith(".so"):  # a shared library that it needs is missing or has another version
        return f"{name}, {where}, does not load ({error}); install it again, or the library that it lacks"
    return None


def _print_notices(options: argparse.Namespace) -> None:
    for notice in options.notices:
        _print_error(f"megapromoe: {notice}")


def _print_error(message: str) -> None:
    """Prints on stderr. Errors are ignored (closed terminal, full disk): then only the exit code reports the error."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Words that argparse refuses end the process with exit code 2.

    In addition to the options of the command, the namespace has
        overrides: words of the form section.key=value, at any position, also after options that take a list; then
            words that are not options, which the configuration reports together with its other problems.
        passed_on: unknown words, for a command that passes them to another program.
        words: the whole command line, in the present spelling of flags.
        notices: a line about flags in an old spelling, or nothing.
    """
    words, notices = renamed(next((word for word in words if word in COMMANDS), ""), words)
    settings = [word for word in words if SETTING.match(word)]
    others = [word for word in words if not SETTING.match(word)]
    parser = _parser(next((word for word in others if word in COMMANDS), None))
    options, unknown = parser.parse_known_args(others)
    options.words, options.notices = words, notices
    options.passed_on, unknown = (unknown, []) if options.passes_on else ([], unknown)
    if settings and options.no_settings:
        parser.error(f"{settings[0]}: {options.no_settings}")
    if wrong := [word for word in unknown if options.no_settings or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}; see megapromoe {options.command} --help")
    options.overrides = [*settings, *unknown]
    return options


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with only the options of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="megapromoe",
        description="Expert-parallel training of ProMoE diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megapromoe {__version__}")
    # The deepspeed launcher inserts this option; launch_environment.py reads the local rank from the environment.
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
        added.set_defaults(no_settings=None, passes_on=False)  # defaults; a command may change them
        if name == chosen:
            command = load(name)
            added.epilog = command.EPILOG
            command.arguments(added)
    return parser


def _as_a_rank(command: Command, options: argparse.Namespace) -> int:
    """Runs a command as one rank of a job. Only rank 0 prints the message of an error that all ranks raise."""
    import logging

    from megapromoe.distributed import launch_environment, process_end
    from megapromoe.distributed.rank_output import ignoring_output_errors

    launch = launch_environment.detect()
    with ignoring_output_errors():
        log = logging.getLogger("megapromoe")
        log.setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
        # All ranks read the same options, so only rank 0 logs the notices about them.
        logging.getLogger("megapromoe.config").setLevel(logging.NOTSET if launch.rank == 0 else logging.ERROR)
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
        if launch.rank == 0:
            _print_notices(options)
        code = _run_rank(command, options, launch)
        process_end.end_if_abandoned(code)
        return code


def _run_rank(command: Command, options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    from megapromoe.distributed import process_end

    try:
        return command.run(options, launch)
    except UserError as error:
        if launch.rank == 0 or not error.on_all_ranks:
            rank = f", rank {launch.rank}" if launch.rank else ""
            _print_error(f"megapromoe{rank}: {error}")
        else:
            _wait_for_rank_0()
        return error.exit_code
    except ImportError as error:
        if missing_package(error) is None and launch.world > 1:
            process_end.exit_with_traceback(error)
        raise  # all ranks have the same packages and exit with the same message
    except Exception as error:
        if launch.world > 1:
            process_end.exit_with_traceback(error)
        raise


def _wait_for_rank_0() -> None:
    """Waits `GRACE` seconds, or until the launcher ends this rank, as it does once rank 0 has ended."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    deadline = time.monotonic() + GRACE
    while not ended and time.monotonic() < deadline:
        time.sleep(POLL)
