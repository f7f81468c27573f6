"""The rendezvous of the ranks, and its errors: they name the variable, its value and the remedy."""

import logging
import socket
import threading
import time

import pytest

from megapromoe.distributed import rendezvous
from megapromoe.distributed.launch_environment import (
    LaunchEnvironment,
    LaunchError,
    StoreUnreachable,
    detect,
    holds_store,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def started(monkeypatch):
    """A function that sets the variables of a rank and returns its launch environment."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)

    def as_rank(rank: int, world: int, port: int, address: str = "127.0.0.1") -> LaunchEnvironment:
        for name, value in zip(TORCHRUN, (rank, world, 0, 1, address, port), strict=True):
            monkeypatch.setenv(name, str(value))
        return detect()

    return as_rank


@pytest.fixture
def listener():
    """A port of a process that accepts connections and never answers, like a stopped holder of the store."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(16)
        yield s.getsockname()[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_rank_beyond_the_world_is_refused(started):
    with pytest.raises(
        LaunchError, match=r"rank 4 of 4 \(RANK=4, WORLD_SIZE=4\): ranks are 0 to WORLD_SIZE - 1.*env -u RANK"
    ):
        started(4, 4, 1)


def test_a_rank_beyond_srun_s_tasks_is_refused(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    values = {"SLURM_PROCID": "2", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}
    for name, value in (values | {"SLURM_STEP_RESV_PORTS": "1", "SLURM_STEP_NODELIST": "localhost"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"rank 2 of 2 \(SLURM_PROCID=2, SLURM_NTASKS=2\)"):
        detect()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_host_is_named_at_once(rank, started, monkeypatch):
    """The look-up is replaced: name servers differ in their errors."""

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    start = time.monotonic()
    with pytest.raises(
        LaunchError, match=rf"rank {rank} on .* cannot resolve the host name 'gpu07' \(MASTER_ADDR=gpu07"
    ) as refused:
        rendezvous.connect_all_ranks(started(rank, 2, 29500, "gpu07"), 600.0)
    assert time.monotonic() - start < 10 and refused.value.exit_code == 2


def test_an_unused_port_is_named_within_seconds_and_in_the_final_error(started, monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "NOTICE_AFTER", 0.3)
    port = free_port()
    message = rf"rank 1 on .* cannot reach 127.0.0.1:{port} \(MASTER_ADDR=127.0.0.1, MASTER_PORT={port}\).*refused"
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnreachable, match=message):
        rendezvous.connect_all_ranks(started(1, 2, port), 1.5)
    assert "cannot reach" in caplog.text and "trying again for" in caplog.text


def test_a_holder_that_accepts_and_never_answers_ends_the_wait(started, listener):
    start = time.monotonic()
    with pytest.raises(StoreUnreachable, match=r"rank 1 on .* cannot reach"):
        rendezvous.connect_all_ranks(started(1, 2, listener), 2.0)
    assert time.monotonic() - start < 30


def test_a_port_that_is_taken_is_named_by_its_variable(started, listener):
    with pytest.raises(StoreUnreachable, match=rf"rank 0 .* MASTER_PORT={listener}.*a port that is not in use"):
        rendezvous.connect_all_ranks(started(0, 2, listener), 5.0)


def test_variables_left_over_in_a_plain_start_are_named_within_seconds(started, monkeypatch, caplog):
    """The process takes itself for rank 0 of three, and no other rank connects."""
    monkeypatch.setattr(rendezvous, "NOTICE_AFTER", 0.3)
    message = r"for 2 of 3 ranks: 1, 2 \(RANK=0, WORLD_SIZE=3\).*env -u RANK -u WORLD_SIZE megapromoe"
    with caplog.at_level(logging.WARNING), pytest.raises(LaunchError, match=message):
        rendezvous.connect_all_ranks(started(0, 3, free_port()), 1.5)
    assert "for 2 of 3 ranks" in caplog.text


def test_the_same_ranks_can_connect_several_times(started, monkeypatch):
    """For several jobs of a process. Both ranks are threads of one process, which would count them together."""
    port = free_port()
    launches = [started(rank, 2, port) for rank in range(2)]
    for attempt in range(2):
        monkeypatch.setattr(rendezvous, "_rendezvous_count", iter([attempt, attempt]))
        stores: dict[int, object] = {}

        def connect(launch, stores=stores):
            stores[launch.rank] = rendezvous.connect_all_ranks(launch, 60.0)

        others = threading.Thread(target=connect, args=(launches[1],))
        others.start()
        connect(launches[0])
        others.join(timeout=60)
        stores[0].set("a", "1")
        assert rendezvous.clone_connection(stores[1], 30.0).get("a") == b"1"
        stores.clear()


def test_a_rank_that_is_started_twice_is_refused(started, monkeypatch):
    monkeypatch.setattr(rendezvous, "_rendezvous_count", iter([0, 0]))
    launch = started(0, 1, free_port())
    kept = rendezvous.connect_all_ranks(launch, 30.0)
    with pytest.raises(LaunchError, match=r"rank 0 was started twice \(RANK=0, WORLD_SIZE=1\)"):
        rendezvous.connect_all_ranks(launch, 30.0)
    del kept
    assert holds_store(launch)
