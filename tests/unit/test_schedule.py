"""The learning rate of each step, and what is said of settings that changed between two starts of a run."""

import pytest

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.resolve import ConfigError, resolve
from megapromoe.config.schedule import describe_changes, learning_rate

COSINE = ("train.lr=1e-3", "train.min_lr=0", "train.schedule=cosine", "train.warmup=0", "train.steps=100")


def config(*overrides: str):
    return resolve("digits", overrides=[*COSINE, *overrides])


def test_extending_a_cosine_raises_the_learning_rate_with_a_log_line():
    lines = describe_changes(config("train.steps=200"), {"train.steps": [100, 200]}, 100)
    last, now = learning_rate(config().train, 99), learning_rate(config("train.steps=200").train, 100)
    assert now > 1000 * last
    assert lines == [
        "train.steps: 100 -> 200",
        f"learning rate: {last:.4g} at step 100 -> {now:.4g} at step 101 (0 without these changes)",
    ]
    assert now == pytest.approx(5e-4)


@pytest.mark.parametrize(
    "changed, now",
    [
        ({"train.lr": [1e-3, 2e-3]}, ("train.lr=2e-3",)),
        ({"train.schedule": ["cosine", "constant"]}, ("train.schedule=constant",)),
        ({"train.warmup": [0, 80]}, ("train.warmup=80",)),
        ({"train.min_lr": [0.0, 1e-4]}, ("train.min_lr=1e-4",)),
    ],
)
def test_a_change_of_any_schedule_setting_is_described(changed, now):
    before = learning_rate(config().train, 50)
    after = learning_rate(config(*now).train, 50)
    (setting, rate) = describe_changes(config(*now), changed, 50)
    assert before != after and f"-> {after:.4g} at step 51 ({before:.4g} without" in rate
    (key, (old, new)) = next(iter(changed.items()))
    assert setting == f"{key}: {old!r} -> {new!r}"


def test_changes_that_leave_the_learning_rate_are_a_line_each():
    changed = {"parallel.ep": [1, 2], "sample.steps": [50, 7], "train.log_every": [10, 1]}
    assert describe_changes(config(), changed, 50) == [
        "parallel.ep: 1 -> 2",
        "sample.steps: 50 -> 7",
        "train.log_every: 10 -> 1",
    ]
    assert describe_changes(config(), {}, 50) == []


def test_no_learning_rate_is_named_where_no_step_follows_or_preceded():
    shorter = config("train.steps=40")
    assert len(describe_changes(shorter, {"train.steps": [100, 40]}, 50)) == 1
    assert len(describe_changes(config("train.lr=2e-3"), {"train.lr": [1e-3, 2e-3]}, 0)) == 1


def test_unreadable_or_missing_stored_values_are_listed_without_an_error():
    changed = {"train.lr": ["fast", 1e-3], "train.gone": [3, None], "train.steps": [None, 100]}
    assert describe_changes(config(), changed, 50) == [
        "train.lr: 'fast' -> 0.001",
        "train.gone: 3 -> None",
        "train.steps: None -> 100",
    ]


def opened(folder) -> RunDirectory:
    run = RunDirectory.open(folder, config(), 1)
    run.close()
    return run


def test_a_dry_run_shows_the_new_learning_rate(tmp_path):
    state = opened(tmp_path).state(config("train.steps=200"), progress="continues from step-00000100", step=100)
    assert "continues from step-00000100; changes\n  train.steps: 100 -> 200\n  learning rate: " in state
    assert state.endswith("-> 0.0005 at step 101 (0 without these changes)")


def test_open_notes_what_changed_for_the_log(tmp_path):
    opened(tmp_path)
    with RunDirectory.open(tmp_path, config("train.steps=200"), 1) as run:
        assert run.changed == {"train.steps": [100, 200]}
    with RunDirectory.open(tmp_path, config("train.steps=200"), 1) as run:
        assert run.changed == {}


# ---- warm-up, stable, decay

WSD = ("train.schedule=wsd", "train.lr=1e-2", "train.warmup=10", "train.steps=100")


def wsd(*overrides: str) -> list[float]:
    """The learning rate of every step."""
    train = resolve("digits", overrides=[*WSD, *overrides]).train
    return [learning_rate(train, step) for step in range(train.steps)]


@pytest.mark.parametrize("start", ["0.75", "75"])
@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_wsd_is_stable_and_then_decays(start, shape):
    rates = wsd(f"train.decay_start={start}", f"train.decay_shape={shape}", "train.min_lr=1e-3")
    assert rates[:10] == pytest.approx([1e-3 * (step + 1) for step in range(10)])
    assert rates[9:76] == [1e-2] * 67
    for step in range(75, 100):
        share = (step - 75) / 25
        rest = 1 - share if shape == "linear" else 1 - share**0.5
        assert rates[step] == pytest.approx(1e-3 + 9e-3 * rest)
    assert all(a > b for a, b in zip(rates[75:], rates[76:], strict=False))


def test_an_extended_stable_part_keeps_its_rates_and_the_change_is_described():
    short, longer = wsd("train.decay_start=0.8"), wsd("train.decay_start=0.8", "train.steps=400")
    assert short[:80] == longer[:80] and longer[80:320] == [1e-2] * 240
    now = resolve("digits", overrides=[*WSD, "train.decay_start=0.8", "train.steps=400"])
    assert describe_changes(now, {"train.steps": [100, 400]}, 60) == ["train.steps: 100 -> 400"]
    (_, line) = describe_changes(now, {"train.steps": [100, 400]}, 90)
    assert line.startswith("learning rate: ") and "-> 0.01 at step 91" in line
    (_, line) = describe_changes(now, {"train.decay_start": [0.1, 0.8]}, 60)
    assert "-> 0.01 at step 61" in line


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ("train.decay_start=100",),
            "train.decay_start = 100.0: must be a step from train.warmup = 10 to below train.st",
        ),
        (("train.decay_start=5",), "train.decay_start = 5.0: must be a step from train.warmup = 10"),
        (("train.decay_start=0.999",), "not step 100"),
        (("train.decay_start=20.5",), "train.decay_start = 20.5: must be a whole number"),
        (("train.decay_start=0",), "train.decay_start"),
        (("train.min_lr=1",), "train.min_lr = 1.0: must be at most train.lr"),
    ],
)
def test_wsd_that_cannot_be(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=[*WSD, *overrides])
    assert sentence in str(error.value)
