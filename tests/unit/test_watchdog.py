"""Hang detection from the ranks' reports, and the store channel.

Real processes hang in test_killed_jobs and test_preflight_jobs.
"""

import math
import threading
import time

import pytest
from torch.distributed import HashStore, TCPStore

from megapromoe.distributed import watchdog as watchdog_module
from megapromoe.distributed.agreement import ConnectedRanks
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.distributed.store_channel import MAX_BYTES, MessageTimeout, StoreChannel
from megapromoe.distributed.watchdog import Watchdog, find_hang


def section(name: str, step: int) -> str:
    return f"section '{name}' of step {step}"


@pytest.fixture
def three():
    """Watchdogs of three ranks whose threads never report: their first heartbeat comes after the test."""
    store = HashStore()
    watchdogs = [Watchdog(StoreChannel(store, rank, 3, 5.0, 5.0), 1000.0, "--limit") for rank in range(3)]
    yield watchdogs
    for watchdog in watchdogs:
        watchdog.close()


def hang_of(watchdogs, alive: tuple[int, ...], idle: float = 1001.0):
    """The hang that rank 0 finds after the ranks `alive` have reported again, with `idle` seconds without progress."""
    before = watchdogs[0]._read()
    for rank in alive:
        watchdogs[rank]._since = time.monotonic() - idle
        watchdogs[rank]._report()
    return find_hang(before, watchdogs[0]._read(), 3, 1000.0)


def test_a_rank_that_hangs_before_its_first_heartbeat_is_named(three):
    for watchdog in three:
        watchdog.at(section("data", 1))
    hang = hang_of(three, alive=(0, 2))
    assert hang.silent == (1,) and hang.place == "section 'data' of step 1"
    assert str(hang) == "silent: rank 1, last in section 'data' of step 1"


def test_only_the_rank_that_never_reported_is_named(three):
    """Not the ranks that wait for it."""
    three[0].at(section("data", 1))
    three[2].at(section("data", 1))
    assert str(hang_of(three, alive=(0, 2))) == "silent: rank 1, which never reported"


def test_of_ranks_that_all_report_those_furthest_behind_are_named(three):
    for watchdog in three:
        watchdog.at(section("data", 4))
    three[0].at(section("update", 4))
    three[0].at(section("data", 5))
    three[1].at(section("update", 4))
    hang = hang_of(three, alive=(0, 1, 2))
    assert hang.behind == (2,)
    assert str(hang) == "furthest behind: rank 2, last in section 'data' of step 4"


def test_a_job_with_a_rank_that_makes_progress_or_pauses_does_not_hang(three):
    for watchdog in three:
        watchdog.at(section("data", 1))
    assert hang_of(three, alive=(0, 1, 2), idle=999.0) is None
    three[1].pause()
    assert hang_of(three, alive=(0, 1, 2)) is None
    assert hang_of(three, alive=(0, 2)).silent == (1,), "a process that stops while it pauses is named"


def test_each_place_is_reported_at_once_with_every_place():
    store = HashStore()
    for every_place, place in ((True, "second"), (False, "first")):
        watchdog = Watchdog(StoreChannel(store, 0, 1, 5.0, 5.0), 1000.0, "--limit", every_place=every_place)
        watchdog.at("first")
        watchdog.at("second")
        assert watchdog._read()[0].place == place
        watchdog.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit, for os._exit
def test_every_rank_ends_with_the_verdict_of_one(monkeypatch):
    ended, printed, exits = {}, {}, {}

    def end(message, code, records, linger):
        rank = int(message.split(":")[0].removeprefix("rank "))
        ended[rank], printed[rank] = (message, code), time.monotonic()
        exits[rank] = printed[rank] + linger
        raise SystemExit

    monkeypatch.setattr(watchdog_module.process_end, "hard_exit", end)
    store, hangs = HashStore(), []

    def on_hang(hang):
        hangs.append(hang)
        return "see the table", 3

    watchdogs = [Watchdog(StoreChannel(store, rank, 3, 5.0, 5.0), 4.8, "--limit", on_hang) for rank in range(3)]
    for watchdog in watchdogs:
        watchdog.at("all_reduce")
    for watchdog in watchdogs:
        watchdog._thread.join(timeout=30)
    assert len(hangs) == 1 and hangs[0].behind == (0, 1, 2) and not hangs[0].silent
    assert sorted(ended) == [0, 1, 2] and {code for _, code in ended.values()} == {3}
    assert all("(--limit = 4.8) in all_reduce; see the table" in message for message, _ in ended.values())
    assert max(printed.values()) < min(exits.values()), "all print their stacks before the first connection closes"
    assert exits[0] > max(exits[1], exits[2]), "rank 0 may hold the store"


# ---- the channel


class Frozen:
    """A store whose holder is stopped: its calls never return."""

    def __init__(self):
        self.calls = 0

    def __getattr__(self, name):
        def wait(*_):
            self.calls += 1
            threading.Event().wait()

        return wait


def test_a_store_that_does_not_answer_ends_every_call_in_time():
    store = Frozen()
    channel = StoreChannel(store, 1, 2, timeout=0.2, receive_timeout=60.0)
    calls = [
        lambda: channel.send("a", 1),
        lambda: channel.receive("a"),
        lambda: channel.receive_if_sent("a"),
        lambda: channel.receive_from_ranks("a"),
        lambda: channel.count("a"),
        lambda: channel.barrier("a", 2),
    ]
    start = time.monotonic()
    for call in calls:
        with pytest.raises(StoreUnreachable, match=r"does not answer \(no answer within 0.2 s"):
            call()
    assert time.monotonic() - start < 5 and store.calls == 1, "no store call after the first that failed"


def test_a_rank_whose_store_does_not_answer_ends_after_the_limit(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog_module.process_end, "hard_exit", lambda *a: ended.append(a))
    watchdog = Watchdog(StoreChannel(Frozen(), 1, 2, timeout=0.2, receive_timeout=60.0), 0.8, "train.step_timeout")
    watchdog.at(section("data", 1))
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    message, code, _, _ = ended[0]
    assert code == 76 and "in section 'data' of step 1; the process that holds the job's store" in message


def test_messages_are_received_complete_or_refused():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    channels = [StoreChannel(server.clone(), rank, 2, 5.0, 0.3) for rank in range(2)]
    assert channels[1].receive_if_sent("x") is None
    channels[0].send("x", {"a": [1, None, "ü"]})
    assert channels[1].receive("x") == {"a": [1, None, "ü"]}
    for channel in channels:
        channel.send(f"rank/{channel.rank}", channel.rank)
    assert channels[0].receive_from_ranks("rank") == {0: 0, 1: 1}
    with pytest.raises(ValueError, match="message 'big': .* bytes, at most"):
        channels[0].send("big", "x" * MAX_BYTES)
    with pytest.raises(MessageTimeout, match="rank 1 waited 0.3 s for message 'y'"):
        channels[1].receive("y")
    with pytest.raises(MessageTimeout, match="2 ranks at 'gate'"):
        channels[1].barrier("gate", 2)
    channels[0].barrier("gate", 2)  # rank 1 has been counted before


def test_a_closed_channel_leaves_no_thread():
    before = set(threading.enumerate())
    channel = StoreChannel(HashStore(), 0, 1, 5.0, 1.0)
    channel.send("x", 1)
    (thread,) = set(threading.enumerate()) - before
    channel.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_rank_whose_connections_break_in_a_hang_waits_for_the_verdict(monkeypatch, capsys):
    """Ranks end one after the other, and the collectives of the rest fail; the message must be the verdict."""
    ended = threading.Event()
    messages = []

    def end(message, code, records, linger):
        messages.append((message, code))
        watchdog._closed.set()
        ended.set()

    monkeypatch.setattr(watchdog_module.process_end, "hard_exit", end)
    store = HashStore()
    watchdog = Watchdog(StoreChannel(store, 1, 2, 5.0, 5.0), 0.8, "--limit")
    watchdog.at("all_reduce")
    start = time.monotonic()
    watchdog.await_verdict(RuntimeError("connection closed"))
    assert time.monotonic() - start < 0.5 and not messages, "without a hang the error is raised at once"
    watchdog._since -= 1.0
    StoreChannel(store, 0, 2, 5.0, 5.0).send("watchdog/verdict", ["silent: rank 0", 76])
    watchdog.await_verdict(RuntimeError("connection closed"))
    assert capsys.readouterr().err.count("RuntimeError: connection closed") == 1
    assert ended.wait(10) and "in all_reduce; silent: rank 0" in messages[0][0] and messages[0][1] == 76
    watchdog.close()


def test_the_flight_record_is_written_or_reported_as_missing(tmp_path, monkeypatch, capsys):
    from torch import distributed
    from torch._C import _distributed_c10d as c10d

    from megapromoe.distributed.process_end import write_flight_record

    folder = tmp_path / "run" / "flight_records"
    write_flight_record(folder)
    assert not folder.exists(), "a process without torch.distributed has no record"
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    monkeypatch.delattr(c10d, "_dump_nccl_trace", raising=False)
    write_flight_record(folder)
    assert "rank 3: no flight record" in capsys.readouterr().err
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    write_flight_record(folder)
    assert (folder / "rank_3").read_bytes() == b"record"


def test_no_place_may_take_longer_than_the_time_out_of_collectives(monkeypatch):
    """Even with additional time, which the message gives."""
    ended = threading.Event()
    messages = []

    def end(message, code, records, linger):
        messages.append(message)
        ended.set()

    monkeypatch.setattr(watchdog_module.process_end, "hard_exit", end)
    watchdog = Watchdog(StoreChannel(HashStore(), 0, 1, 5.0, 5.0), 0.8, "train.step_timeout", longest=2.0)
    start = time.monotonic()
    watchdog.at("saving", extra=math.inf)
    assert ended.wait(30) and time.monotonic() - start > 2.0
    watchdog.close()
    assert "(train.step_timeout = 0.8, 1.2 s more for this place) in saving; furthest behind: rank 0" in messages[0]


def test_a_place_without_limit_is_no_hang_in_a_job_of_one_rank(monkeypatch):
    monkeypatch.setattr(watchdog_module.process_end, "hard_exit", lambda *a: pytest.fail(str(a)))
    watchdog = Watchdog(StoreChannel(HashStore(), 0, 1, 5.0, 5.0), 0.4, "--limit")
    watchdog.at("saving", extra=math.inf)
    watchdog._since -= 1e6
    assert watchdog._idle() == 0
    watchdog.at("a step")
    watchdog._since -= 1.0
    assert watchdog._idle() > 0.4
    watchdog.pause()
    watchdog.close()


def test_places_are_reported_to_the_watchdogs_of_this_job_only(three):
    watchdog_module.at("before")
    with watchdog_module.watched_by(three[0]):
        watchdog_module.at("data")
        with watchdog_module.watched_by(three[1]):
            watchdog_module.at("inner")
        watchdog_module.at("outer")
    watchdog_module.at("after")
    assert [watchdog._place for watchdog in three] == ["outer", "inner", ""]
    assert [watchdog._closed.is_set() for watchdog in three] == [True, True, False]


def test_connected_ranks_end_together_and_rank_0_last(three):
    store = HashStore()
    ranks = [ConnectedRanks(store, StoreChannel(store, rank, 3, 5.0, 5.0), three[rank]) for rank in range(3)]
    left = []

    def leave(rank):
        ranks[rank].wait_for_all()
        left.append(rank)

    threads = [threading.Thread(target=leave, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(timeout=0.6)
    assert threads[0].is_alive() and not left, "one rank has not finished"
    threads[2].start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(left) == [0, 1, 2] and left[2] == 0


def test_a_rank_whose_store_does_not_answer_waits_for_its_watchdog(three, monkeypatch):
    channel = StoreChannel(Frozen(), 1, 3, timeout=0.1, receive_timeout=60.0)
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("megapromoe.distributed.agreement.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        ConnectedRanks(HashStore(), channel, three[1]).wait_for_all()
    assert len(sleeps) == 3, "neither an error nor a return"
