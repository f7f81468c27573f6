"""How the ranks of a job meet: through a key-value store that rank 0 or the launcher holds.

A wrong address, a missing rank or a holder that does not answer is named with the variables it comes from. Every wait
has a limit, also where torch's store has none: a holder that is stopped still accepts connections.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer  # its own class before Python 3.11
from contextlib import closing
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store

from megapromoe.distributed.launch_environment import (
    Launch,
    LaunchError,
    RanksMissing,
    StoreUnreachable,
    address_source,
    holds_store,
    identity_source,
    node_name,
    unset_hint,
)
from megapromoe.distributed.store_channel import StoreChannel

logger = logging.getLogger(__name__)

NOTICE = 10.0  # seconds after which a rank that waits says for whom
LOOKUP = 5.0  # seconds to ask for a name again, where the name server does not answer
ITSELF = 15.0  # seconds within which the holder must reach its own store
POLL = 0.1  # seconds between two looks; all ranks look at one store

T = TypeVar("T")
_meetings = itertools.count()  # of this process: all ranks meet as often


def meet(launch: Launch, timeout: float, purpose: str) -> Store:
    """The key-value store of the job, with names of its own for `purpose`, waiting for nobody but its holder.

    Args:
        timeout: seconds to try for; also of each wait of the store, until `set_timeout`.

    Raises LaunchError if the address is no known name, StoreUnreachable if the holder cannot be reached.
    """
    holder = holds_store(launch)
    deadline = time.monotonic() + timeout
    if holder:
        _look_up(launch)
    else:
        _wait_for_holder(launch, deadline)
    left = max(deadline - time.monotonic(), 1.0)
    limit = min(left, ITSELF) if holder else left

    def connect() -> Store:
        place = (launch.address, launch.port, None, holder, timedelta(seconds=limit))
        return dist.TCPStore(*place, wait_for_workers=False, multi_tenant=True)

    try:
        store = _within(limit + 1, connect)
    except (RuntimeError, NoAnswer) as error:
        raise StoreUnreachable(_unreached(launch, str(error) or f"no answer within {limit:.0f} s")) from error
    store.set_timeout(timedelta(seconds=timeout))
    return dist.PrefixStore(f"{purpose} {launch.job} {launch.attempt}", store)


def own_connection(store: Store, timeout: float) -> Store:
    """A second connection to the holder of a store, whose calls do not wait for those of the first.

    Raises StoreUnreachable if the holder does not answer within `timeout` seconds.
    """
    try:
        return _within(timeout, store.clone)  # type: ignore[attr-defined]  # torch's annotations lack it
    except (RuntimeError, NoAnswer) as error:
        said = str(error) or f"no answer within {timeout:g} s"
        raise StoreUnreachable(f"the process that holds the job's store does not answer ({said})") from error


def gather(launch: Launch, timeout: float) -> Store:
    """The store of the job, once all ranks have come. Collective.

    Raises LaunchError if a rank comes twice; RanksMissing, naming those that are missing, if not all come within
    `timeout` seconds; else as `meet`.
    """
    start = time.monotonic()
    store = meet(launch, timeout, f"meeting {next(_meetings)}, attempt")
    with closing(StoreChannel(store, launch.rank, launch.world, min(timeout, 30.0), timeout)) as channel:
        _arrive(channel, launch, timeout, start)
    return store


def _arrive(channel: StoreChannel, launch: Launch, timeout: float, start: float) -> None:
    if channel.count(f"here/{launch.rank}") > 1:
        raise LaunchError(
            f"rank {launch.rank} came twice ({identity_source(launch)}); start each rank once, and no second"
            f" job at {launch.address}:{launch.port}"
        )
    channel.count("arrived")
    noticed = False
    while channel.count("arrived", 0) < launch.world:
        waited = time.monotonic() - start
        if waited > timeout:
            raise RanksMissing(_missing(channel, launch, waited))
        if waited > NOTICE and not noticed and launch.rank == 0:
            noticed = True
            logger.warning("%s", _missing(channel, launch, waited))
        time.sleep(POLL)


def _missing(channel: StoreChannel, launch: Launch, waited: float) -> str:
    missing = [rank for rank in range(launch.world) if not channel.count(f"here/{rank}", 0)]
    ranks = f"{', '.join(map(str, missing[:16]))}{', ...' * (len(missing) > 16)}"
    said = (
        f"rank {launch.rank} on {node_name()} has waited {waited:.0f} s at {launch.address}:{launch.port} for"
        f" {len(missing)} of {launch.world} ranks: {ranks} ({identity_source(launch)});"
        " see whether they were started and reach this place"
    )
    return said + unset_hint(launch)


def _wait_for_holder(launch: Launch, deadline: float) -> None:
    """Waits until somebody accepts connections at the job's address: rank 0 may start later than the others."""
    start, noticed = time.monotonic(), False
    _look_up(launch)
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(min(left, 5.0), 0.1)).close()
            return
        except OSError as error:
            said = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise StoreUnreachable(_unreached(launch, said))
        if time.monotonic() - start > NOTICE and not noticed:
            noticed = True
            logger.warning("%s; trying on for %.0f s", _unreached(launch, said), left)
        time.sleep(POLL)


def _look_up(launch: Launch) -> None:
    """Raises LaunchError if the job's address is a name that this node does not know."""
    deadline = time.monotonic() + LOOKUP
    while True:
        try:
            socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN and time.monotonic() < deadline
            if not again:
                raise LaunchError(
                    f"rank {launch.rank} on {node_name()} does not know the host {launch.address!r}"
                    f" ({address_source(launch)}; {error.strerror or error}); give the name or address of the"
                    " node of rank 0"
                ) from error
        time.sleep(0.5)


def _unreached(launch: Launch, said: str) -> str:
    place, source = f"{launch.address}:{launch.port}", address_source(launch)
    said = said.splitlines()[0]
    if holds_store(launch):
        return (
            f"rank 0 on {node_name()} does not reach {place} ({source}), where it should answer itself"
            f" ({said}); give an address of this node, and a port that nobody uses"
        )
    return (
        f"rank {launch.rank} on {node_name()} does not reach {place} ({source}), where rank 0 or the launcher"
        f" should answer ({said}); see whether that node lives and lets this one through"
    )


def _within(seconds: float, operation: Callable[[], T]) -> T:
    """The result of an operation, in a thread that is left alone after so many seconds. Raises NoAnswer then."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="rendezvous", daemon=True).start()
    return answer.result(seconds)
