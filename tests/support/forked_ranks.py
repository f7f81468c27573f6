"""Ranks that are processes of their own, which a test may freeze and kill, and whose start takes no time.

They are forked from the server of the workers, which has imported everything, as an interpreter of its own would do in
seconds of a processor.
"""

import os
import signal
import sys
from pathlib import Path

from support.processes import context, start_server


class ForkedRank:
    """`megapromoe WORDS` in a process of its own; what it writes is in a file. Used as a `subprocess.Popen`."""

    def __init__(self, words: list[str], environment: dict[str, str], output: Path, call: str = "sys.exit(main())"):
        """`call`: Python that runs the command line; the names in `support.hanging` are known."""
        start_server()
        self._process = context.Process(target=_run, args=(words, environment, str(output), call))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"the process did not end within {timeout} s"
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_to_end(words: list[str], environment: dict[str, str], output: Path, limit: float = 240.0) -> tuple[int, str]:
    """The exit code of `megapromoe WORDS` in such a process, and what it wrote."""
    process = ForkedRank(words, environment, output)
    try:
        return process.wait(limit), output.read_text()
    finally:
        process.kill()


def _run(words: list[str], environment: dict[str, str], output: str, call: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["megapromoe", *words]
    from support import hanging

    exec(call, vars(hanging))
