"""Rendezvous: the ranks of a job connect to a key-value store that is held by rank 0 or the launcher.

Errors for a wrong address, a missing rank or a holder that does not answer name the variables that these come from.
Every wait has a time-out, even where torch's store has none: a stopped holder still accepts connections.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store

from megapromoe.distributed import process_end
from megapromoe.distributed.launch_environment import (
    LaunchEnvironment,
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

NOTICE_AFTER = 10.0  # seconds after which a waiting rank logs what it waits for
RESOLVE_TIMEOUT = 5.0  # seconds during which a name is looked up again if the name server does not answer
OWN_STORE_TIMEOUT = 15.0  # seconds within which the holder must reach its own store
POLL = 0.1  # seconds between two reads of the store, which all ranks share

T = TypeVar("T")
_rendezvous_count = itertools.count()  # of this process; equal on all ranks, which make the same calls


def create_store(launch: LaunchEnvironment, timeout: float, purpose: str) -> Store:
    """Creates or connects to the key-value store of the job. Waits for the holder of the store only.

    Args:
        launch: this rank's identity.
        timeout: seconds to try to connect; also the time-out of the store's calls until `set_timeout`.
        purpose: prefix of the keys, so that several uses of the store do not collide.

    Raises LaunchError if the address does not resolve, StoreUnreachable if the holder cannot be reached.
    """
    holder = holds_store(launch)
    deadline = time.monotonic() + timeout
    if holder:
        _resolve_address(launch)
    else:
        _wait_for_holder(launch, deadline)
    remaining = max(deadline - time.monotonic(), 1.0)
    limit = min(remaining, OWN_STORE_TIMEOUT) if holder else remaining

    def connect() -> Store:
        arguments = (launch.address, launch.port, None, holder, timedelta(seconds=limit))
        return dist.TCPStore(*arguments, wait_for_workers=False, multi_tenant=True)

    try:
        store = _call_with_timeout(limit + 1, connect)
    except (RuntimeError, FutureTimeout) as error:
        raise StoreUnreachable(_unreachable_message(launch, str(error) or f"no answer within {limit:.0f} s")) from error
    store.set_timeout(timedelta(seconds=timeout))
    return dist.PrefixStore(f"{purpose} {launch.job} {launch.attempt}", store)


def clone_connection(store: Store, timeout: float) -> Store:
    """A second connection to the holder of a store, whose calls do not wait for calls on the first connection.

    Raises StoreUnreachable if the holder does not answer within `timeout` seconds.
    """
    try:
        return _call_with_timeout(timeout, store.clone)  # type: ignore[attr-defined]  # torch's annotations lack it
    except (RuntimeError, FutureTimeout) as error:
        reason = str(error) or f"no answer within {timeout:g} s"
        raise StoreUnreachable(f"the process that holds the job's store does not answer ({reason})") from error


def connect_all_ranks(launch: LaunchEnvironment, timeout: float) -> Store:
    """Returns the store of the job when all ranks have connected to it. Collective.

    Raises LaunchError if a rank connects twice; RanksMissing, which lists the missing ranks, if not all connect within
    `timeout` seconds; otherwise as `create_store`.
    """
    start = time.monotonic()
    store = create_store(launch, timeout, f"rendezvous {next(_rendezvous_count)}, attempt")
    with closing(StoreChannel(store, launch.rank, launch.world, min(timeout, 30.0), timeout)) as channel:
        _wait_for_ranks(channel, launch, timeout, start)
    return store


def _wait_for_ranks(channel: StoreChannel, launch: LaunchEnvironment, timeout: float, start: float) -> None:
    if channel.count(f"connected/{launch.rank}") > 1:
        raise LaunchError(
            f"rank {launch.rank} was started twice ({identity_source(launch)}); start each rank once, and no second job"
            f" at {launch.address}:{launch.port}"
        )
    channel.count("connected")
    warned = False
    while channel.count("connected", 0) < launch.world:
        waited = time.monotonic() - start
        if waited > timeout:
            raise RanksMissing(_missing_message(channel, launch, waited))
        if waited > NOTICE_AFTER and not warned and launch.rank == 0:
            warned = True
            logger.warning("%s", _missing_message(channel, launch, waited))
        time.sleep(POLL)


def _missing_message(channel: StoreChannel, launch: LaunchEnvironment, waited: float) -> str:
    missing = [rank for rank in range(launch.world) if not channel.count(f"connected/{rank}", 0)]
    ranks = f"{', '.join(map(str, missing[:16]))}{', ...' * (len(missing) > 16)}"
    message = (
        f"rank {launch.rank} on {node_name()} has waited {waited:.0f} s at {launch.address}:{launch.port} for"
        f" {len(missing)} of {launch.world} ranks: {ranks} ({identity_source(launch)});"
        " check that they were started and can reach this address"
    )
    return message + unset_hint(launch)


def _wait_for_holder(launch: LaunchEnvironment, deadline: float) -> None:
    """Waits until connections are accepted at the job's address: rank 0 may start later than this rank."""
    start, warned = time.monotonic(), False
    _resolve_address(launch)
    while True:
        remaining = deadline - time.monotonic()
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(min(remaining, 5.0), 0.1)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise StoreUnreachable(_unreachable_message(launch, reason))
        if time.monotonic() - start > NOTICE_AFTER and not warned:
            warned = True
            logger.warning("%s; trying again for %.0f s", _unreachable_message(launch, reason), remaining)
        time.sleep(POLL)


def _resolve_address(launch: LaunchEnvironment) -> None:
    """Raises LaunchError if the job's address is a host name that does not resolve on this node."""
    deadline = time.monotonic() + RESOLVE_TIMEOUT
    while True:
        try:
            socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            retry = getattr(error, "errno", None) == socket.EAI_AGAIN and time.monotonic() < deadline
            if not retry:
                raise LaunchError(
                    f"rank {launch.rank} on {node_name()} cannot resolve the host name {launch.address!r}"
                    f" ({address_source(launch)}; {error.strerror or error}); give the name or address of the"
                    " node of rank 0"
                ) from error
        time.sleep(0.5)


def _unreachable_message(launch: LaunchEnvironment, reason: str) -> str:
    address, source = f"{launch.address}:{launch.port}", address_source(launch)
    reason = reason.splitlines()[0]
    if holds_store(launch):
        return (
            f"rank 0 on {node_name()} cannot reach its own store at {address} ({source}; {reason}); give an address of"
            " this node and a port that is not in use"
        )
    return (
        f"rank {launch.rank} on {node_name()} cannot reach {address} ({source}), where rank 0 or the launcher holds the"
        f" job's store ({reason}); check that this node is up and accepts connections from others"
    )


def _call_with_timeout(seconds: float, operation: Callable[[], T]) -> T:
    """Runs `operation` in a thread and returns its result.

    Raises FutureTimeout after `seconds`; the thread is then abandoned.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=work, name="rendezvous", daemon=True)
    thread.start()
    try:
        return answer.result(seconds)
    except FutureTimeout:
        process_end.abandon(thread)
        raise
