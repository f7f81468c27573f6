"""Who is named for a hang, from what ranks told; with real processes: `test_killed_jobs.py`."""

import pytest
from torch.distributed import HashStore

from megapromoe.distributed.watchdog import Watchdog


@pytest.fixture
def three():
    """Watchdogs of three ranks whose threads never get to say anything: the first pulse is far away."""
    store = HashStore()
    dogs = [Watchdog(store, rank, 3, limit=1000.0) for rank in range(3)]
    yield dogs
    for dog in dogs:
        dog.close()


def verdict(dogs, alive: dict[int, tuple[int, str]]) -> str:
    """The first rank's, after those `alive` have said once more where they are."""
    before = dogs[0]._heard()
    for rank, where in alive.items():
        dogs[rank]._tell(where)
    return dogs[0]._suspects(before, dogs[0]._heard())


def test_a_rank_that_hangs_before_its_first_pulse_is_named(three):
    for dog in three:
        dog.at(1, "data")
    assert verdict(three, {0: (8, "update"), 2: (8, "data")}) == "silent: rank 1, last in section 'data' of step 1"


def test_who_never_took_a_step_is_named_alone(three):
    """Not those that wait for it."""
    three[0].at(1, "data")
    three[2].at(1, "data")
    assert verdict(three, {0: (1, "data"), 2: (1, "data")}) == "silent: rank 1, which never took a step"


def test_of_ranks_that_all_answer_those_furthest_behind_are_named(three):
    for dog in three:
        dog.at(4, "data")
    said = verdict(three, {0: (5, "data"), 1: (4, "update"), 2: (4, "data")})
    assert said == "furthest behind: rank 2, last in section 'data' of step 4"
