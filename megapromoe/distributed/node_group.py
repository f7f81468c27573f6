"""The nodes of a torchrun job agree which of them take part in an attempt.

Node 0 listens at the job's address. The other nodes connect, and stay connected while they wait. When all nodes have
come, or after some time as many as the configuration can run on, node 0 tells each of them who takes part. A node that
comes later waits for the next attempt: a job on fewer nodes than it could have is stopped with a checkpoint for it.

Messages are lines of JSON; an empty line shows that the other side still runs. A node that is cut off from the network
sends none, so it is left out, also where its connection was never closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megapromoe.errors import ExitCode, UserError

logger = logging.getLogger(__name__)

HEARTBEAT = 2.0  # seconds between two empty lines
SILENT_AFTER = 10.0  # seconds without a line after which the other side is given up
POLL = 0.1
NOTICE_EVERY = 60.0  # seconds between two lines in the log about what a node waits for


class NodesMissing(UserError):
    """Node 0 does not answer, or too few nodes have come."""

    exit_code = ExitCode.FAILED


class OtherJob(UserError):
    """A node of another job, or with other settings, has connected."""

    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class NodeGroup:
    """The nodes of an attempt.

    Attributes:
        nodes: their numbers in the job, ascending; the first is 0.
        names: their host names.
    """

    nodes: tuple[int, ...]
    names: tuple[str, ...]


@dataclass
class _Connection:
    socket: socket.socket
    last_line: float
    node: int = -1  # known from its first line on; -1 again after the last message to it
    name: str = ""
    unread: bytes = b""
    has_ended: bool = False


class NodeServer:
    """Node 0's side. Its thread keeps the connections of waiting nodes until `close`.

    Args:
        port: port to listen at.
        job: identity of the job; nodes with another one are refused.
        name: host name of node 0.
        counts: numbers of nodes that the configuration can run on.
        on_more: called when more nodes could take part than do; again every `HEARTBEAT` until `close`.
    """

    def __init__(self, port: int, job: str, name: str, counts: Collection[int], on_more: Callable[[], None]):
        self.job, self.name, self.counts, self.on_more = job, name, sorted(counts), on_more
        self._listener = _listen(port)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        self._members = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="nodes", daemon=True)
        self._thread.start()

    def gather(self, wait: float, timeout: float) -> NodeGroup:
        """Waits for nodes and returns who takes part: the largest possible number, those with the lowest numbers.

        Args:
            wait: seconds to wait for all nodes; after that, fewer are enough.
            timeout: seconds after which NodesMissing is raised if even those have not come.
        """
        start = notice = time.monotonic()
        while True:
            with self._lock:
                waiting = {c.node: c for c in self._connections.values() if c.node > 0}
                possible = [count for count in self.counts if count <= 1 + len(waiting)]
                waited = time.monotonic() - start
                if possible and (possible[-1] == self.counts[-1] or waited >= wait):
                    return self._start(waiting, possible[-1])
            present = ", ".join(f"{node} ({waiting[node].name})" for node in sorted(waiting)) or "no other"
            missing = f"waits for {self.counts[-1]} nodes, or {self.counts[0]} after {wait:.0f} s; connected: {present}"
            if waited >= timeout:
                raise NodesMissing(
                    f"node 0 on {self.name} {missing}; gave up after {waited:.0f} s: start the launcher on every node,"
                    " with the same MASTER_ADDR and MASTER_PORT"
                )
            if time.monotonic() - notice > NOTICE_EVERY:
                notice = time.monotonic()
                logger.warning("node 0 %s", missing)
            time.sleep(POLL)

    def close(self, done: bool = False) -> None:
        """Ends the thread and all connections. With `done`, waiting nodes learn that the job is done."""
        self._closed.set()
        self._thread.join()
        for connection in [c for c in self._connections.values() if done and c.node > 0]:
            self._send_last(connection, {"done": True})
        deadline = time.monotonic() + HEARTBEAT
        while any(c.has_ended for c in self._connections.values()) and time.monotonic() < deadline:
            self._receive_all()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._selector.close()

    def _start(self, waiting: dict[int, _Connection], count: int) -> NodeGroup:
        nodes = (0, *sorted(waiting)[: count - 1])
        group = NodeGroup(nodes, (self.name, *(waiting[node].name for node in nodes[1:])))
        for node in nodes[1:]:
            self._send_last(waiting[node], {"nodes": group.nodes, "names": group.names})
        self._members = count
        return group

    def _serve(self) -> None:
        beat = time.monotonic()
        while not self._closed.is_set():
            self._receive_all()
            if time.monotonic() - beat > HEARTBEAT:
                beat = time.monotonic()
                self._beat(beat)

    def _receive_all(self) -> None:
        """Handles what arrives within `POLL` seconds."""
        for key, _ in self._selector.select(POLL):
            with self._lock:
                if key.fileobj is self._listener:
                    self._accept()
                elif connection := self._connections.get(key.fileobj):  # type: ignore[call-overload]
                    self._receive(connection)

    def _beat(self, now: float) -> None:
        with self._lock:
            for connection in list(self._connections.values()):
                if now - connection.last_line > SILENT_AFTER:
                    self._drop(connection)
                elif connection.node > 0:
                    self._send(connection, None)
            available = self._members + sum(c.node > 0 for c in self._connections.values())
            more = 0 < self._members < max((count for count in self.counts if count <= available), default=0)
        if more:
            self.on_more()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            self._connections[accepted] = _Connection(accepted, time.monotonic())
            self._selector.register(accepted, selectors.EVENT_READ)

    def _receive(self, connection: _Connection) -> None:
        try:
            received = connection.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received or len(connection.unread) > 4096:
            self._drop(connection)
            return
        connection.last_line = time.monotonic()
        *lines, connection.unread = (connection.unread + received).split(b"\n")
        for line in filter(None, lines):
            self._introduce(connection, line)

    def _introduce(self, connection: _Connection, line: bytes) -> None:
        """Handles the first line of a node. Whatever else connects to this port is dropped."""
        if connection.has_ended:
            return
        try:
            message = json.loads(line)
            node, name, job = int(message["node"]), str(message["name"]), str(message["job"])
        except (ValueError, KeyError, TypeError):
            self._drop(connection)
            return
        if job != self.job or not 0 < node < self.counts[-1]:
            expected = f"{self.name} expects {self.counts[-1]} nodes, numbered from 0, of {self.job!r}"
            self._send_last(connection, {"refused": f"node {node} on {name} is of {job!r}, but {expected}"})
            return
        for earlier in [c for c in self._connections.values() if c.node == node]:
            self._drop(earlier)  # the node was started again
        connection.node, connection.name = node, name

    def _send(self, connection: _Connection, message: Any) -> None:
        with contextlib.suppress(OSError):  # a node that is gone; its connection is dropped when it is read
            connection.socket.send(_line(message))

    def _send_last(self, connection: _Connection, message: Any) -> None:
        """Sends a message after which the node closes the connection.

        It is not closed here: if a line of the node were unread, the node would get an error instead of the message.
        """
        self._send(connection, message)
        connection.node, connection.has_ended = -1, True

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket, None):
            self._selector.unregister(connection.socket)
            connection.socket.close()


def join(address: str, port: int, job: str, node: int, name: str, timeout: float) -> NodeGroup | None:
    """The side of another node: waits until it can take part. Returns None if the job is done without it.

    Raises NodesMissing after `timeout` seconds in which node 0 does not answer; OtherJob if it is of another job.
    """
    answered, notice, reason = time.monotonic(), time.monotonic(), ""
    while True:
        try:
            with socket.create_connection((address, port), timeout=5.0) as connection:
                connection.sendall(_line({"job": job, "node": node, "name": name}))
                unread = b""
                while received := _receive_or_beat(connection):
                    answered = time.monotonic()
                    *lines, unread = (unread + received).split(b"\n")
                    for message in map(json.loads, filter(None, lines)):
                        if "refused" in message:
                            raise OtherJob(f"{message['refused']}; check MASTER_ADDR, NNODES, NODE_RANK and RUN_DIR")
                        return None if "done" in message else NodeGroup(*map(tuple, message.values()))
                reason = "it closed the connection"
        except OSError as error:
            reason = error.strerror or str(error)
        silent = time.monotonic() - answered
        source = f"node {node} on {name} cannot reach node 0 at {address}:{port} ({reason})"
        if silent > timeout:
            raise NodesMissing(
                f"{source} since {silent:.0f} s; check that node 0 runs and that this node reaches this address"
            )
        if time.monotonic() - notice > NOTICE_EVERY:
            notice = time.monotonic()
            logger.warning("%s; trying again for %.0f s", source, timeout - silent)
        time.sleep(min(1.0, HEARTBEAT / 2))


def _receive_or_beat(connection: socket.socket) -> bytes:
    """What node 0 sends next; meanwhile sends empty lines. b"" or OSError if node 0 is gone or silent."""
    connection.settimeout(HEARTBEAT)
    deadline = time.monotonic() + SILENT_AFTER
    while True:
        try:
            received = connection.recv(4096)
            connection.sendall(_line(None))
            return received
        except TimeoutError:
            connection.sendall(_line(None))
            if time.monotonic() > deadline:
                raise TimeoutError("it is silent") from None


def _line(message: Any) -> bytes:
    return b"\n" if message is None else json.dumps(message).encode() + b"\n"


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", port), backlog=128)
