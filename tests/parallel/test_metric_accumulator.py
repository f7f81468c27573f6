"""Logged means: over the steps that changed the model, whatever the others were, and without a wait for the device."""

import json
import math

import pytest
import torch
from support.processes import run
from support.training_runs import train
from support.trajectory import small

from megapromoe.benchmark.counters import Counter
from megapromoe.distributed.agreement import this_rank
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.training.metric_accumulator import MetricAccumulator

NAN = math.nan
LOAD_LE = torch.tensor([[4.0, 2, 2, 0], [2, 2, 2, 2]])


def micro_batch(window: MetricAccumulator, loss: float, load: float = 1.0) -> None:
    rcl_L = torch.tensor([0.5, 1.0]) * loss
    window.add(
        torch.tensor(loss), torch.tensor(2 * loss), AuxiliaryOutput({"rcl": rcl_L}, load * LOAD_LE, load * rcl_L)
    )


def windows(losses: list[list[float]], applied: list[bool], damaged: int = 0) -> tuple[dict, dict, int]:
    """A closed window of steps with the losses of their micro-batches, of rank 0; rank 1's are larger by 1."""
    config = small(f"train.accumulation={len(losses[0])}")
    window = MetricAccumulator(config, make_mesh(1, 1, timeout=60), torch.device("cpu"))
    for step, is_applied in zip(losses, applied, strict=True):
        window.damaged += damaged
        for loss in step:
            micro_batch(window, loss + this_rank())
        window.end_step(torch.tensor(is_applied))
    values, layers = window.close(norm=7.0, rate=0.1)
    return values, layers, window.all_damaged


def test_means_are_over_the_applied_steps_of_all_ranks():
    losses = [[1.0, 2.0], [NAN, 3.0], [5.0, 6.0], [1e30, math.inf]]
    results = run(2, windows, losses, [True, False, True, False], 1)
    for values, layers, damaged in results:
        assert values["denoising_loss"] == (1 + 2 + 5 + 6) / 4 + 0.5
        assert (
            values["total_loss"] == 2 * values["denoising_loss"]
            and values["contrastive_loss"] == 1.5 * values["denoising_loss"]
        )
        assert (values["steps_averaged"], values["gradient_norm"], values["learning_rate"]) == (2, 7.0, 0.1)
        assert torch.equal(layers["expert_load"], 8 * LOAD_LE) and values["dead_experts"] == 1
        assert layers["gate"].tolist() == pytest.approx([0.5 * values["denoising_loss"], values["denoising_loss"]])
        assert damaged == values["damaged_samples"] == 8, "records are damaged whatever becomes of the step"


def test_a_window_without_an_applied_step_has_no_means():
    for values, layers, _ in run(2, windows, [[NAN], [2.0]], [False, False]):
        assert {name: values[name] for name in ("total_loss", "denoising_loss", "contrastive_loss")} == dict.fromkeys(
            values.keys() & {"total_loss", "denoising_loss", "contrastive_loss"}
        )
        assert values["steps_averaged"] == 0 and not layers
        assert "dead_experts" not in values and values["images_per_second"] > 0


def waits_of_a_step() -> list[dict]:
    window = MetricAccumulator(small(), make_mesh(1, 1, timeout=60), torch.device("cpu"))
    counts = []
    for _ in range(2):
        applied = torch.tensor(True)
        with Counter() as counter:
            micro_batch(window, 1.0)
            micro_batch(window, 1.0)
            window.end_step(applied)
        counts.append({"waits": dict(counter.total.waits), "sent": dict(counter.total.collectives)})
    return counts


def test_a_step_is_accumulated_without_a_wait_or_a_message():
    assert run(1, waits_of_a_step) == [[{"waits": {}, "sent": {}}] * 2]


def test_another_set_of_metrics_is_a_bug():
    assert run(1, changed_metrics) == [True]


def changed_metrics() -> bool:
    window = MetricAccumulator(small(), make_mesh(1, 1, timeout=60), torch.device("cpu"))
    micro_batch(window, 1.0)
    window.end_step(torch.tensor(True))
    window.add(torch.tensor(1.0), torch.tensor(1.0), AuxiliaryOutput({}, LOAD_LE, torch.ones(2)))
    with pytest.raises(ValueError, match="contrastive_loss"):
        window.end_step(torch.tensor(True))
    return True


def spoilt(folder: str, bad: tuple[int, ...], *overrides: str) -> None:
    """The losses of some steps are not a number, on rank 1 alone."""
    from megapromoe.engine.engine import Engine

    real, calls = Engine.micro_step, []

    def micro_step(self, *inputs, loss):
        calls.append(1)

        def with_nan(prediction, auxiliary):
            is_bad = len(calls) in bad and torch.distributed.get_rank() == 1
            return loss(prediction * NAN if is_bad else prediction, auxiliary)

        return real(self, *inputs, loss=with_nan)

    Engine.micro_step = micro_step
    train(folder, "parallel.ep=2", "train.save_every=0", "train.max_bad_steps=9", *overrides)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_a_loss_that_is_not_finite_leaves_the_means_of_its_window(tmp_path, fault_table):
    each, window = tmp_path / "each", tmp_path / "window"
    run(2, spoilt, str(each), (2, 4, 5, 6), "train.steps=7")
    run(2, spoilt, str(window), (2, 4, 5, 6), "train.steps=7", "train.log_every=3")
    steps = lines(each)
    assert [line["steps_averaged"] for line in steps] == [1, 0, 1, 0, 0, 0, 1]
    assert [line["total_loss"] is None for line in steps] == [False, True, False, True, True, True, False]
    first, last, _ = lines(window)
    assert first["total_loss"] == pytest.approx((steps[0]["total_loss"] + steps[2]["total_loss"]) / 2, rel=1e-6)
    assert first["steps_averaged"] == 2 and first["expert_load"]
    assert last["steps_averaged"] == 0 and last["total_loss"] is last["denoising_loss"] is None
    fault_table.append(
        (
            "a loss that is not finite",
            "no rank updates; the logged means are those of the other steps, with their number",
            "that step",
        )
    )
