"""Messages between the ranks of a job through its key-value store; needs no GPU, NCCL or process group.

Every call has a time-out. If the holder of the store (rank 0 or the launcher) is stopped or cut off, calls of torch's
client never return. So they run in a daemon thread, and the caller waits for a result for `timeout` seconds at most.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from torch.distributed import Store

from megapromoe.distributed import process_end
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.errors import UserError

PAUSE = 0.01  # seconds between two reads of the store
MAX_BYTES = 1 << 24  # of a message

_JOIN_TIMEOUT = 5.0  # seconds

T = TypeVar("T")


class MessageTimeout(UserError):
    """A message from another rank was not received in time."""


class StoreChannel:
    """JSON messages between the `world` ranks of a job; this is rank `rank`.

    Args:
        store: of the job. The channel uses it in its own thread, so each channel needs its own connection
            (`rendezvous.clone_connection`).
        timeout: seconds within which the store must answer a call.
        receive_timeout: seconds that `receive` and `barrier` wait for other ranks.
    """

    def __init__(self, store: Store, rank: int, world: int, timeout: float, receive_timeout: float):
        self.store, self.rank, self.world = store, rank, world
        self.timeout, self.receive_timeout = timeout, receive_timeout
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._unreachable = ""
        self._thread = threading.Thread(target=self._run_calls, name="store channel", daemon=True)
        self._thread.start()

    def send(self, name: str, value: Any) -> None:
        """Publishes a message for all ranks; a later one with the same name replaces it.

        Args:
            value: any value that JSON can represent.

        Raises StoreUnreachable, or ValueError for a message larger than `MAX_BYTES`.
        """
        text = json.dumps(value)
        if len(text) > MAX_BYTES:
            raise ValueError(f"message {name!r}: {len(text):,} bytes, at most {MAX_BYTES:,} are possible")
        self._call(lambda: self.store.set(name, text))

    def receive(self, name: str) -> Any:
        """Waits for a message and returns it. Raises MessageTimeout or StoreUnreachable."""
        self._wait(lambda: self._call(lambda: self.store.check([name])), f"message {name!r}")
        return json.loads(self._call(lambda: self.store.get(name)))

    def receive_if_sent(self, name: str) -> Any | None:
        """The message if it has been sent, otherwise None. Raises StoreUnreachable."""

        def get() -> bytes | None:
            return self.store.get(name) if self.store.check([name]) else None

        text = self._call(get)
        return None if text is None else json.loads(text)

    def receive_from_ranks(self, prefix: str) -> dict[int, Any]:
        """The messages `prefix/RANK` that have been sent, by rank. Raises StoreUnreachable."""
        messages = {rank: self.receive_if_sent(f"{prefix}/{rank}") for rank in range(self.world)}
        return {rank: message for rank, message in messages.items() if message is not None}

    def count(self, name: str, amount: int = 1) -> int:
        """Adds to the counter `name`, which starts at 0, and returns the sum. Raises StoreUnreachable."""
        return self._call(lambda: self.store.add(name, amount))

    def barrier(self, name: str, ranks: int) -> None:
        """Waits until `ranks` ranks have called it. Raises MessageTimeout or StoreUnreachable."""
        self.count(name)
        self._wait(lambda: self.count(name, 0) >= ranks, f"{ranks} ranks at {name!r}")

    def close(self) -> None:
        """Ends the thread, which may be in a call of the watchdog. The channel must not be used afterwards."""
        self._calls.put(None)
        if not self._unreachable:
            self._thread.join(min(self.timeout, _JOIN_TIMEOUT))
        process_end.abandon(self._thread)

    def _wait(self, condition: Callable[[], bool], purpose: str) -> None:
        deadline = time.monotonic() + self.receive_timeout
        while not condition():
            if time.monotonic() > deadline:
                raise MessageTimeout(
                    f"rank {self.rank} waited {self.receive_timeout:g} s for {purpose}; check that the other ranks are"
                    " running"
                )
            time.sleep(PAUSE)

    def _call(self, operation: Callable[[], T]) -> T:
        """Runs a store operation in the channel's thread. After one StoreUnreachable, later calls raise it at once."""
        if self._unreachable:
            raise StoreUnreachable(self._unreachable)
        answer: Future[T] = Future()
        self._calls.put((operation, answer))
        try:
            return answer.result(self.timeout)
        except FutureTimeout:
            problem = f"no answer within {self.timeout:g} s"
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            problem = str(error).splitlines()[0]
        self._unreachable = (
            f"the process that holds the job's store (rank 0 or the launcher) does not answer ({problem});"
            " check that this process and its node are running"
        )
        raise StoreUnreachable(self._unreachable)

    def _run_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            operation, answer = call
            try:
                answer.set_result(operation())
            except BaseException as error:
                answer.set_exception(error)
