"""Who is named for a hang, from what ranks reported. With real processes: test_killed_jobs, test_preflight_jobs."""

import math
import threading
import time

import pytest
from torch.distributed import HashStore, TCPStore

from megapromoe.distributed import watchdog as watchdog_module
from megapromoe.distributed.agreement import MetRanks
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.distributed.store_channel import MAX_BYTES, MessageTimeout, StoreChannel
from megapromoe.distributed.watchdog import Watchdog, find_hang


def section(name: str, step: int) -> str:
    return f"section '{name}' of step {step}"


@pytest.fixture
def three():
    """Watchdogs of three ranks whose threads never report by themselves: the first pulse is far away."""
    store = HashStore()
    dogs = [Watchdog(StoreChannel(store, rank, 3, 5.0, 5.0), 1000.0, "--limit") for rank in range(3)]
    yield dogs
    for dog in dogs:
        dog.close()


def hang_of(dogs, alive: tuple[int, ...], idle: float = 1001.0):
    """What rank 0 finds after the ranks `alive` have reported once more, having been where they are for so long."""
    before = dogs[0]._read()
    for rank in alive:
        dogs[rank]._since = time.monotonic() - idle
        dogs[rank]._report()
    return find_hang(before, dogs[0]._read(), 3, 1000.0)


def test_a_rank_that_hangs_before_its_first_pulse_is_named(three):
    for dog in three:
        dog.at(section("data", 1))
    hang = hang_of(three, alive=(0, 2))
    assert hang.silent == (1,) and hang.place == "section 'data' of step 1"
    assert str(hang) == "silent: rank 1, last in section 'data' of step 1"


def test_who_never_reported_is_named_alone(three):
    """Not those that wait for it."""
    three[0].at(section("data", 1))
    three[2].at(section("data", 1))
    assert str(hang_of(three, alive=(0, 2))) == "silent: rank 1, which never reported"


def test_of_ranks_that_all_report_those_furthest_behind_are_named(three):
    for dog in three:
        dog.at(section("data", 4))
    three[0].at(section("update", 4))
    three[0].at(section("data", 5))
    three[1].at(section("update", 4))
    hang = hang_of(three, alive=(0, 1, 2))
    assert hang.behind == (2,)
    assert str(hang) == "furthest behind: rank 2, last in section 'data' of step 4"


def test_a_job_in_which_some_rank_moves_or_pauses_does_not_hang(three):
    for dog in three:
        dog.at(section("data", 1))
    assert hang_of(three, alive=(0, 1, 2), idle=999.0) is None
    three[1].pause()
    assert hang_of(three, alive=(0, 1, 2)) is None
    assert hang_of(three, alive=(0, 2)).silent == (1,), "a process that stops while it pauses is named"


def test_a_place_is_reported_at_once_where_asked_for():
    store = HashStore()
    for every_place, place in ((True, "second"), (False, "first")):
        dog = Watchdog(StoreChannel(store, 0, 1, 5.0, 5.0), 1000.0, "--limit", every_place=every_place)
        dog.at("first")
        dog.at("second")
        assert dog._read()[0].place == place
        dog.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit, for os._exit
def test_every_rank_ends_with_the_verdict_of_one(monkeypatch):
    ended = {}

    def end(message, code, records):
        ended[int(message.split(":")[0].removeprefix("rank "))] = (message, code)
        raise SystemExit

    monkeypatch.setattr(watchdog_module.process_end, "end", end)
    store, judged = HashStore(), []

    def on_hang(hang):
        judged.append(hang)
        return "see the table", 3

    dogs = [Watchdog(StoreChannel(store, rank, 3, 5.0, 5.0), 0.8, "--limit", on_hang) for rank in range(3)]
    for dog in dogs:
        dog.at("all_reduce")
    for dog in dogs:
        dog._thread.join(timeout=30)
    assert len(judged) == 1 and judged[0].behind == (0, 1, 2) and not judged[0].silent
    assert sorted(ended) == [0, 1, 2] and {code for _, code in ended.values()} == {3}
    assert all("(--limit = 0.8) in all_reduce; see the table" in message for message, _ in ended.values())


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
    channel = StoreChannel(store, 1, 2, timeout=0.2, patience=60.0)
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
    assert time.monotonic() - start < 5 and store.calls == 1, "after the first one no call is tried"


def test_a_rank_whose_store_does_not_answer_ends_after_the_limit(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog_module.process_end, "end", lambda *a: ended.append(a))
    dog = Watchdog(StoreChannel(Frozen(), 1, 2, timeout=0.2, patience=60.0), 0.8, "train.step_timeout")
    dog.at(section("data", 1))
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    dog.close()
    message, code, _ = ended[0]
    assert code == 76 and "in section 'data' of step 1; the process that holds the job's store" in message


def test_messages_arrive_whole_or_are_refused():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    channels = [StoreChannel(server.clone(), rank, 2, 5.0, 0.3) for rank in range(2)]
    assert channels[1].receive_if_sent("x") is None
    channels[0].send("x", {"a": [1, None, "ü"]})
    assert channels[1].receive("x") == {"a": [1, None, "ü"]}
    for channel in channels:
        channel.send(f"here/{channel.rank}", channel.rank)
    assert channels[0].receive_from_ranks("here") == {0: 0, 1: 1}
    with pytest.raises(ValueError, match="message 'big': .* bytes, at most"):
        channels[0].send("big", "x" * MAX_BYTES)
    with pytest.raises(MessageTimeout, match="rank 1 waited 0.3 s for message 'y'"):
        channels[1].receive("y")
    with pytest.raises(MessageTimeout, match="2 ranks at 'gate'"):
        channels[1].barrier("gate", 2)
    channels[0].barrier("gate", 2)  # the other one was there


def test_a_closed_channel_leaves_no_thread():
    before = set(threading.enumerate())
    channel = StoreChannel(HashStore(), 0, 1, 5.0, 1.0)
    channel.send("x", 1)
    (thread,) = set(threading.enumerate()) - before
    channel.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_rank_whose_connections_break_in_a_hang_waits_for_the_verdict(monkeypatch, capsys):
    """Ranks end one after the other; the collectives of those that are left fail, which is not what is to be told."""
    ended = threading.Event()
    told = []

    def end(message, code, records):
        told.append((message, code))
        dog._closed.set()
        ended.set()

    monkeypatch.setattr(watchdog_module.process_end, "end", end)
    store = HashStore()
    dog = Watchdog(StoreChannel(store, 1, 2, 5.0, 5.0), 0.8, "--limit")
    dog.at("all_reduce")
    start = time.monotonic()
    dog.await_verdict(RuntimeError("connection closed"))
    assert time.monotonic() - start < 0.5 and not told, "nothing hangs: the error is told at once"
    dog._since -= 1.0
    StoreChannel(store, 0, 2, 5.0, 5.0).send("watchdog/verdict", ["silent: rank 0", 76])
    dog.await_verdict(RuntimeError("connection closed"))
    assert capsys.readouterr().err.count("RuntimeError: connection closed") == 1
    assert ended.wait(10) and "in all_reduce; silent: rank 0" in told[0][0] and told[0][1] == 76
    dog.close()


def test_nccl_s_flight_record_lies_in_the_folder_or_is_named_as_missing(tmp_path, monkeypatch, capsys):
    from torch import distributed
    from torch._C import _distributed_c10d as c10d

    from megapromoe.distributed.process_end import write_flight_record

    folder = tmp_path / "run" / "flight_records"
    write_flight_record(folder)
    assert not folder.exists(), "a process in no job has none"
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    monkeypatch.delattr(c10d, "_dump_nccl_trace", raising=False)
    write_flight_record(folder)
    assert "rank 3: no flight record" in capsys.readouterr().err
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    write_flight_record(folder)
    assert (folder / "rank_3").read_bytes() == b"record"


def test_no_place_may_take_longer_than_collectives_wait(monkeypatch):
    """However much more time it is given; and the message says how much that was."""
    ended = threading.Event()
    messages = []

    def end(message, code, records):
        messages.append(message)
        ended.set()

    monkeypatch.setattr(watchdog_module.process_end, "end", end)
    dog = Watchdog(StoreChannel(HashStore(), 0, 1, 5.0, 5.0), 0.8, "train.step_timeout", longest=2.0)
    start = time.monotonic()
    dog.at("saving", extra=math.inf)
    assert ended.wait(30) and time.monotonic() - start > 2.0
    dog.close()
    assert "(train.step_timeout = 0.8, 1.2 s more for this) in saving; furthest behind: rank 0" in messages[0]


def test_a_place_that_may_take_any_time_is_no_hang_of_a_process_that_is_alone(monkeypatch):
    monkeypatch.setattr(watchdog_module.process_end, "end", lambda *a: pytest.fail(str(a)))
    dog = Watchdog(StoreChannel(HashStore(), 0, 1, 5.0, 5.0), 0.4, "--limit")
    dog.at("saving", extra=math.inf)
    dog._since -= 1e6
    assert dog._idle() == 0
    dog.at("a step")
    dog._since -= 1.0
    assert dog._idle() > 0.4
    dog.pause()
    dog.close()


def test_places_go_to_the_watchdogs_of_this_job_alone(three):
    watchdog_module.at("before")
    with watchdog_module.watching(three[0]):
        watchdog_module.at("data")
        with watchdog_module.watching(three[1]):
            watchdog_module.at("inner")
        watchdog_module.at("outer")
    watchdog_module.at("after")
    assert [dog._place for dog in three] == ["outer", "inner", ""]
    assert [dog._closed.is_set() for dog in three] == [True, True, False]


def test_ranks_that_met_leave_together_and_rank_0_last(three):
    store = HashStore()
    ranks = [MetRanks(store, StoreChannel(store, rank, 3, 5.0, 5.0), three[rank]) for rank in range(3)]
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
    channel = StoreChannel(Frozen(), 1, 3, timeout=0.1, patience=60.0)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("megapromoe.distributed.agreement.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        MetRanks(HashStore(), channel, three[1]).wait_for_all()
    assert len(looks) == 3, "neither an error nor a return"
