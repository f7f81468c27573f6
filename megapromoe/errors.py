"""The base class of every error whose message is meant for the user.

The command line prints such an error as one message and exits with its code. Any other exception is a bug, and its
traceback is shown.
"""

from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can act on: its message names what is wrong, the rule, and the remedy.

    Attributes:
        exit_code: exit code of the process.
        on_all_ranks: every rank of the job raises it, so that rank 0 alone prints it.
    """

    exit_code = 1
    on_all_ranks = False


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
