"""The base class of every error whose message is meant for the user, and the exit codes of the program.

The command line prints such an error as one message and exits with its code. Any other exception is a bug, and its
traceback is shown.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command. Launchers decide by them whether repeating the command can help."""

    DONE = 0
    FAILED = 1
    """Something failed that may succeed at another time or on other nodes; a bug, too."""
    MISCONFIGURED = 2
    """The command, the configuration, a path or what is installed is wrong: repeating cannot help."""
    BAD_NODES = 3
    """`megapromoe check` found nodes that are unfit: other nodes may help."""
    STOPPED = 75
    """Stopped by a signal and saved (EX_TEMPFAIL): repeating the command continues."""
    HUNG = 76
    """A rank hung and was named."""
    INTERRUPTED = 130
    """Ctrl-C."""
    OUTPUT_CLOSED = 141
    """Nobody reads the output any more, as in `megapromoe show | head`; the code of a program that SIGPIPE ends."""


class UserError(Exception):
    """An error that the user can act on: its message names what is wrong, the rule, and the remedy.

    Attributes:
        exit_code: exit code of the process.
        on_all_ranks: every rank of the job raises it, so that rank 0 alone prints it.
    """

    exit_code: int = ExitCode.FAILED
    on_all_ranks = False


@contextmanager
def repeating_cannot_help(*kinds: type[UserError]) -> Iterator[None]:
    """Gives errors of these kinds that the block raises the exit code of a wrong configuration."""
    try:
        yield
    except kinds as error:
        error.exit_code = ExitCode.MISCONFIGURED
        raise


class Violations(UserError):
    """Input of which several things may be wrong at once.

    Attributes:
        violations: a sentence for each; the message holds them all.
        subject: where they are, for the message's first line.
    """

    subject = "the input"

    def __init__(self, violations: Iterable[str]):
        self.violations = tuple(violations)
        count = "1 problem" if len(self.violations) == 1 else f"{len(self.violations)} problems"
        super().__init__("\n  - ".join([f"{count} in {self.subject}:", *self.violations]))
