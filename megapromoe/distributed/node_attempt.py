"""One attempt of a torchrun job on this node: finds the other nodes and runs the steps on those that take part.

launchers/torchrun.sh runs `python -m megapromoe.distributed.node_attempt OPTIONS -- STEP ... -- STEP ...` on every node
and repeats it by its exit code. A step is the words of a megapromoe command, such as check or train; the next step runs
if the one before returned 0. The exit code is that of the last step that ran on this node.

SIGTERM and SIGUSR1 are passed on to the ranks, which save. Before the first step SIGTERM ends this program.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from megapromoe.distributed.launch_environment import node_name
from megapromoe.distributed.node_group import NodeGroup, NodeServer, join
from megapromoe.errors import ExitCode, UserError


class Attempt:
    """The steps of this node, and the process of the running one.

    Args:
        options: see `parse`.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self._process: subprocess.Popen | None = None
        self._passed_on: set[int] = set()
        self._training_since: float | None = None

    def run(self) -> int:
        """Finds the nodes and runs the steps. Returns the exit code."""
        o = self.options
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        if o.node > 0:
            group = join(o.address, o.port, o.job, o.node, node_name(), o.timeout)
            return ExitCode.DONE if group is None else self._run_steps(group)
        server = NodeServer(o.port, o.job, node_name(), o.counts, self._stop_for_more_nodes)
        code: int = ExitCode.FAILED
        try:
            code = self._run_steps(server.gather(o.wait, max(o.timeout, o.wait)))
        finally:
            server.close(done=code == ExitCode.DONE)
        return code

    def _run_steps(self, group: NodeGroup) -> int:
        listed = ", ".join(f"{node} ({name})" for node, name in zip(group.nodes, group.names, strict=True))
        print(f"nodes of this attempt: {listed}; {len(group.nodes)} of {self.options.counts[-1]}", flush=True)
        if self.options.nodes_file:
            self.options.nodes_file.write_text(",".join(group.names) + "\n", encoding="utf-8")
        code = 0
        for number, words in enumerate(self.options.steps):
            is_last = number + 1 == len(self.options.steps)
            command = torchrun_command(self.options, group, number, words)
            with subprocess.Popen(command) as self._process:
                self._training_since = time.monotonic() if is_last else None
                code = self._process.wait()
            self._process = self._training_since = None
            if signal.SIGTERM in self._passed_on and not is_last:
                return ExitCode.STOPPED  # there is nothing to save before the last step
            if any(code in (-number, 128 + number) for number in self._passed_on):
                return ExitCode.STOPPED  # it came before the ranks handle signals, so there was nothing to save
            if code:
                return code
        return code

    def _pass_on(self, number: int, frame: FrameType | None = None) -> None:
        self._passed_on.add(number)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
        elif number == signal.SIGTERM:
            sys.exit(ExitCode.STOPPED)

    def _stop_for_more_nodes(self) -> None:
        """Stops the last step with a checkpoint, so that the next attempt runs on more nodes.

        It has run for `wait` seconds then: nodes that come and go must not keep the job from training.
        """
        since = self._training_since
        if since is None or time.monotonic() - since < self.options.wait:
            return
        self._training_since = None
        print("another node can take part: the job saves and goes on with it", flush=True)
        self._pass_on(signal.SIGUSR1)


def torchrun_command(options: argparse.Namespace, group: NodeGroup, step: int, words: list[str]) -> list[str]:
    """The command that runs a step on this node of a group.

    Each step has a port of its own, because the launcher's store of the step before may still be open. The first rank
    of the node writes to the terminal and to its log, the others to their logs.
    """
    ranks = options.ranks_per_node
    command = [sys.executable, "-m", "megapromoe.distributed.torchrun"]
    command += [f"--nnodes={len(group.nodes)}", f"--node-rank={group.nodes.index(options.node)}"]
    command += [f"--nproc-per-node={ranks}", f"--master-addr={options.address}"]
    command += [f"--master-port={options.port + 1 + step}", "--max-restarts=0"]
    command += [f"--rdzv-conf=timeout={options.timeout:.0f}", f"--log-dir={options.logs / words[0]}", "--tee=0:3"]
    if ranks > 1:
        command += [f"--redirects={','.join(f'{rank}:3' for rank in range(1, ranks))}"]
    return [*command, "-m", "megapromoe", *words]


def parse(words: list[str]) -> argparse.Namespace:
    """The options, and `steps`: the words of each step, which begin after a "--" each."""
    parts = [list(part) for is_mark, part in itertools.groupby(words, lambda word: word == "--") if not is_mark]
    parser = argparse.ArgumentParser(prog="node_attempt", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--node", type=int, required=True, help="number of this node; node 0 holds MASTER_ADDR")
    parser.add_argument("--counts", required=True, help="numbers of nodes that the configuration can run on: 2,4")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--address", required=True, help="of node 0")
    parser.add_argument("--port", type=int, required=True, help="on node 0; the next ones, one for each step, too")
    parser.add_argument("--wait", type=float, required=True, help="seconds after which fewer nodes are enough")
    parser.add_argument("--timeout", type=float, required=True, help="seconds without an answer of a node")
    parser.add_argument("--job", required=True, help="the same on all nodes of a job")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the output of ranks")
    parser.add_argument("--nodes-file", type=Path, help="file for the host names of the nodes that take part")
    options = parser.parse_args(parts[0])
    options.counts = sorted(int(count) for count in options.counts.split(","))
    options.steps = parts[1:]
    if not options.steps:
        parser.error("no step: write -- and the words of a megapromoe command")
    return options


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return Attempt(parse(words)).run()
    except UserError as error:
        print(f"megapromoe: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
