"""Averaged weights: the warm-up of their decay, and how much of them is still the initial weights."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megapromoe.checkpoint.average import Average, averages_at_start, averages_of, share_in_words
from megapromoe.config.average_decay import decay_at
from megapromoe.config.options import Config, to_dict
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.config.train_options import TrainConfig
from megapromoe.engine.averaged_weights import EMA
from megapromoe.training.step_tracker import StepTracker

APPLIED = (True, True, False, True, True, False, True, True, True, True, True, True)


def average_over(weights: list[float], applied, decay: float, warmup: bool, on_device: bool, split: int = 0) -> float:
    """The average after steps that leave `weights`, as `EMA` makes it; with `split`, resumed after so many steps."""
    master = torch.tensor([1.0])
    engine = SimpleNamespace(
        partitions=[SimpleNamespace(master=master)], clips_on_device=on_device, fused_averages=None
    )
    ema, updates = EMA(engine, [decay], warmup), 0
    for step, (weight, was_applied) in enumerate(zip(weights, applied, strict=True)):
        if split and step == split:
            average = ema.averages[0][0]
            ema = EMA(engine, [decay], not warmup)
            ema.averages[0][0].copy_(average)
            ema.continue_from([updates], warmup)
        master.fill_(weight)
        ema.update(SimpleNamespace(applied=was_applied, applied_on_device=torch.tensor(was_applied)))
        updates += was_applied
    return float(ema.averages[0][0])


def expected_average(weights: list[float], applied, decay: float, warmup: bool) -> float:
    average, updates = 1.0, 0
    for weight, was_applied in zip(weights, applied, strict=True):
        if was_applied:
            updates += 1
            d = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
            average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.4, True)])
def test_an_average_is_that_of_the_formula_and_counts_applied_steps(decay, warmup, on_device):
    weights = [math.sin(step) for step in range(len(APPLIED))]
    average = average_over(weights, APPLIED, decay, warmup, on_device)
    assert average == pytest.approx(expected_average(weights, APPLIED, decay, warmup), abs=1e-6)
    assert average_over(weights, APPLIED, decay, warmup, on_device, split=7) == average, "exact upon resume"


def test_the_decay_warms_up_to_the_constant():
    assert [decay_at(t, 0.9999, True) for t in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_at(10**6, 0.9999, True) == 0.9999 and decay_at(1, 0.9999, False) == 0.9999


def progressed(t: TrainConfig, manifest: dict, applied) -> StepTracker:
    progress = StepTracker(t, manifest)
    for step, was_applied in enumerate(applied, start=1):
        progress.add(step, SimpleNamespace(applied=was_applied, stop=False, save=False, norm=1.0))
    return progress


@pytest.mark.parametrize("warmup", [False, True])
def test_the_share_is_what_is_left_of_the_initial_weights(warmup):
    """Weights that are 1 at the start and 0 after each update: the average is the share itself."""
    t = TrainConfig(ema_decay=0.8, ema_warmup=warmup, log_every=1, save_every=0)
    share = progressed(t, {}, APPLIED).average.initial_share
    assert share == pytest.approx(average_over([0.0] * len(APPLIED), APPLIED, 0.8, warmup, True), rel=1e-5)
    assert share == pytest.approx(math.prod(decay_at(u, 0.8, warmup) for u in range(1, sum(APPLIED) + 1)))


def test_the_share_stays_right_where_the_decay_changes_at_a_resume():
    t = TrainConfig(ema_decay=0.9, log_every=1, save_every=0)
    first = progressed(t, {}, [True] * 10)
    second = progressed(replace(t, ema_decay=0.5), first.metadata() | {"config": to_dict(Config(train=t))}, [True] * 3)
    assert second.average.initial_share == pytest.approx(0.9**10 * 0.5**3)


def test_warm_up_is_decided_at_the_first_start():
    t = TrainConfig(ema_decay=0.9, ema_warmup=True, log_every=1, save_every=0)
    began = progressed(t, {}, [True] * 3)
    later = progressed(replace(t, ema_warmup=False), began.metadata(), [True])
    assert later.average.initial_share == pytest.approx(math.prod(decay_at(u, 0.9, True) for u in range(1, 5)))
    without = progressed(replace(t, ema_warmup=False), {}, [True])
    assert progressed(t, without.metadata(), [True]).average.initial_share == pytest.approx(0.9**2)


def earlier_manifest(**more) -> dict:
    """A manifest of a version without a warm-up."""
    config = to_dict(Config(train=TrainConfig(ema_decay=0.9999)))
    del config["train"]["ema_warmup"]
    return {"step": 250, "updates": 250, "config": config, **more}


def test_of_an_earlier_checkpoint_the_share_follows_from_decay_and_updates():
    average = averages_of(earlier_manifest(run="abc", recent_norms=[]))[0]
    assert average.initial_share == pytest.approx(0.9999**250) and average.warmup is False
    warming = replace(resolve("digits").train, ema_decay=0.9999)
    resumed = averages_at_start([average], warming)[0].average
    assert resumed.warmup is False, "it resumes as before, whatever the preset says now"


def test_of_converted_weights_it_is_unknown_and_their_run_begins_with_the_start():
    average = averages_of(earlier_manifest())[0]
    assert average.initial_share is None and average.warmup is None and not average.warning("ema")
    assert averages_at_start([average], TrainConfig(ema_warmup=True))[0].average.warmup is True
    assert "unknown" in average.in_words()


def test_a_warning_names_share_and_remedy_above_five_percent():
    average = Average(False, 0.0501, 250, 0.9999)
    for part in ("5.0%", "train.ema_decay = 0.9999", "250 updates", "--weights master", "train.ema_warmup=true"):
        assert part in average.warning("ema")
    assert not average.warning("master")
    assert not Average(False, 0.05, 250, 0.9999).warning("ema")
    assert not Average(False, 1.0, 0, 0.9999).warning("ema"), "before the first update the weights are the same"
    assert share_in_words(0.0) == "less than 0.1% of them still the initial weights"


@pytest.mark.parametrize("name", PRESETS)
def test_small_presets_warm_up_and_large_ones_keep_the_published_constant(name):
    train = resolve(name).train
    assert train.ema_warmup is (name in ("digits", "fashion", "scenes"))
    assert train.ema_warmup or train.ema_decay == 0.9999
