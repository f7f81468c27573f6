"""The base class of errors with a message for the user, and the exit codes of the program.

The command line prints the message of such an error and exits with its code. Any other exception is a bug, so its
traceback is printed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of all commands. Launchers use them to decide whether to repeat the command."""

    DONE = 0
    FAILED = 1
    """A failure that may not occur at another time or on other nodes; also a bug."""
    MISCONFIGURED = 2
    """The command, the configuration, a path or the installation is wrong: repeating cannot help."""
    BAD_NODES = 3
    """`megapromoe check` found nodes that are unfit: other nodes may help."""
    STOPPED = 75
    """Stopped by a signal and saved (EX_TEMPFAIL): repeating the command continues."""
    HUNG = 76
    """A rank hung and was named."""
    INTERRUPTED = 130
    """Ctrl-C."""
    OUTPUT_CLOSED = 141
    """The reader of the output has closed it, as in `megapromoe show | head`; the exit code of SIGPIPE."""


class UserError(Exception):
    """An error that the user can correct. The message names the problem, the rule and the remedy.

    Attributes:
        exit_code: exit code of the process.
        on_all_ranks: all ranks of the job raise it, so only rank 0 prints it.
    """

    exit_code: int = ExitCode.FAILED
    on_all_ranks = False


@contextmanager
def repeating_cannot_help(*kinds: type[UserError]) -> Iterator[None]:
    """Sets the exit code of a wrong configuration on errors of these kinds that the block raises."""
    try:
        yield
    except kinds as error:
        error.exit_code = ExitCode.MISCONFIGURED
        raise


class Violations(UserError):
    """An error that lists all problems of an input.

    Attributes:
        violations: a sentence for each problem; the message contains all of them.
        subject: name of the input, for the first line of the message.
    """

    subject = "the input"

    def __init__(self, violations: Iterable[str]):
        self.violations = tuple(violations)
        count = "1 problem" if len(self.violations) == 1 else f"{len(self.violations)} problems"
        super().__init__("\n  - ".join([f"{count} in {self.subject}:", *self.violations]))
