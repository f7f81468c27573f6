"""When the host looks at a step: one step late, so that the device never waits; at once where something needs it."""

import pytest
import torch

from megapromoe.config.train_options import TrainConfig
from megapromoe.engine.step_result import StepResult, votes_of
from megapromoe.training.step_tracker import SaveClock, StepTracker


class Step:
    """A step's result that says whether anybody looked."""

    def __init__(self, applied: bool = True, stop: bool = False, norm: float = 1.0, save: bool = False):
        self.values, self.looked = (applied, stop, norm, save), False

    def __getattr__(self, name: str):
        self.looked = True
        return dict(zip(("applied", "stop", "norm", "save"), self.values, strict=True))[name]


def looked_at(t: TrainConfig, steps: int) -> list[tuple[int, bool]]:
    """Of each step: was the one before it looked at, and it itself, when it was taken in?"""
    progress, results, looked = StepTracker(t, {}), [], []
    for step in range(1, steps + 1):
        results.append(Step())
        progress.add(step, results[-1])
        looked.append((all(r.looked for r in results[:-1]), results[-1].looked))
    assert progress.updates == sum(r.looked for r in results)
    return looked


def test_a_step_result_is_read_after_the_next_step_has_started():
    t = TrainConfig(steps=8, log_every=4, save_every=0)
    assert looked_at(t, 8) == [(True, step in (4, 8)) for step in range(1, 9)]


@pytest.mark.parametrize("setting", ["log_every", "save_every", "sample_every", "snapshot_every"])
def test_a_result_is_read_at_once_if_its_step_logs_saves_or_samples(setting):
    t = TrainConfig(**{"steps": 100, "log_every": 50, "save_every": 0, setting: 3})
    assert [itself for _, itself in looked_at(t, 7)] == [False, False, True, False, False, True, False]


def test_spikes_are_judged_by_all_norms_so_far():
    assert all(itself for _, itself in looked_at(TrainConfig(steps=100, log_every=50, spike_factor=3.0), 5))


def test_a_vote_to_stop_is_read_one_step_late_and_no_result_stays_unread():
    manifest = {"updates": 7, "recent_norms": [0.5]}
    progress, last = StepTracker(TrainConfig(steps=100, log_every=50), manifest), Step(norm=3.0)
    progress.add(1, Step(stop=True, norm=2.0))
    assert not progress.stop
    progress.add(2, last)
    assert progress.stop and last.looked
    assert progress.updates == 9 and list(progress.recent) == [0.5, 2.0, 3.0]


def test_a_save_by_the_clock_is_found_one_step_late_and_due_once():
    progress, last = StepTracker(TrainConfig(steps=100, log_every=50), {}), Step(save=True)
    progress.add(1, Step(save=True))
    assert not progress.save
    progress.add(2, last)  # rank 0 has asked in this step too, since nothing was saved yet
    assert progress.save and last.looked and progress.updates == 2
    progress.saved()
    progress.add(3, Step())
    progress.add(4, Step())
    assert not progress.save


@pytest.mark.parametrize("stopping", [0, 1, 5000])
@pytest.mark.parametrize("saving", [0, 1, 5000])
def test_votes_to_stop_and_to_save_are_reduced_as_one_number(stopping, saving):
    votes = sum([votes_of(True, False)] * stopping) + sum([votes_of(False, True)] * saving) + votes_of(False, False)
    result = StepResult(torch.tensor([4.0, votes], dtype=torch.float64), max_norm=10.0)
    assert (result.stop, result.save, result.norm) == (stopping > 0, saving > 0, 2.0)


def test_only_rank_0_requests_a_save_when_it_is_due():
    seconds = 0.0
    clocks = [SaveClock(0.5, rank, lambda: seconds) for rank in (0, 1)] + [SaveClock(0.0, 0, lambda: seconds)]
    requests = []
    for seconds in (29.0, 30.0, 31.0, 45.0, 60.9, 61.0):
        requests.append([clock.due() for clock in clocks])
        if seconds == 31.0:
            clocks[0].restart()
    assert requests == [[late, False, False] for late in (False, True, True, False, False, True)]


def test_steps_that_were_not_applied_are_no_updates_and_too_many_end_the_run(caplog):
    t = TrainConfig(steps=100, log_every=50, max_bad_steps=2, global_batch=16)
    progress = StepTracker(t, {})
    for step, applied in enumerate((False, True, False, False), start=1):
        progress.add(step, Step(applied, norm=float("nan")))
    assert progress.updates == 1 and len(progress.recent) == 1
    assert not progress.diverged
    progress.add(5, Step())
    assert progress.diverged and progress.updates == 2, "the step that was under way is looked at too"
    assert "step 3: gradient norm nan is not finite, or a spike; no rank updated; samples 32..47" in caplog.text


def test_skipped_steps_are_counted_over_a_stop_and_a_new_start():
    t = TrainConfig(steps=100, log_every=1, max_bad_steps=3)
    first = StepTracker(t, {})
    first.add(1, Step(applied=False, norm=float("inf")))
    first.add(2, Step(applied=False, norm=float("inf")))
    second = StepTracker(t, first.metadata())
    second.add(3, Step(applied=False, norm=float("inf")))
    assert not first.diverged and second.diverged and second.skipped_in_a_row == 3
    assert StepTracker(t, second.metadata()).skipped_in_a_row == 0, (
        "a run that ended so goes on when its user starts it again"
    )
