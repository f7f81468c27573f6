"""Routing recorded in training: what the routers decided, once for each step, whatever ends and resumes the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import losses, train
from support.trajectory import small

import megapromoe.training.loop as loop
from megapromoe.benchmark.counters import Counter
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.routing_trace import TRACE_FILE, TraceError, read_records, read_trace
from megapromoe.training.routing_recorder import RoutingRecorder

EVERY_STEP = "train.routing_trace_every=1"
NULL = ("data.condition_dropout=0.999999",)  # every image of the run is null


def counted(folder: str, *overrides: str) -> dict[int, np.ndarray]:
    """Trains; counts the rows of this rank in the routers themselves: step -> (M, E)."""
    from megapromoe.nn.moe.routers import Router

    rows: dict[int, list] = {}
    real, real_step = Router.output, loop.Engine.step
    counts: list[torch.Tensor] = []

    def output(self, assignment, *args, **kwargs):
        counts.append(torch.bincount(assignment.expert_R, minlength=self.num_experts))
        return real(self, assignment, *args, **kwargs)

    def step(self, *args):
        rows[len(rows) + 1] = torch.stack(counts).numpy()
        counts.clear()
        return real_step(self, *args)

    Router.output, loop.Engine.step = output, step
    try:
        train(folder, *overrides)
    finally:
        Router.output, loop.Engine.step = real, real_step
    return rows


LAYOUTS = [
    (1, (), 1, 1),
    (2, ("parallel.ep=2", "train.accumulation=2"), 2, 2),
    full(4, ("parallel.tp=2", "parallel.ep=2"), 2, 1),
    full(4, ("parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true"), 2, 2),
    full(4, ("parallel.ep=2", "model.router=race", "model.batch_scope=global"), 2, 2),
    full(2, ("parallel.ep=2", "model.router=ec"), 2, 2),
]


@pytest.mark.parametrize("world, overrides, ep, group", LAYOUTS, ids=str)
def test_a_record_has_the_rows_that_each_rank_routed(world, overrides, ep, group, tmp_path):
    settings = ("train.routing_trace_every=2", "train.log_every=3", "train.save_every=0", *overrides)
    of_ranks = run(world, counted, str(tmp_path / "run"), *settings)
    tp = 2 if "parallel.tp=2" in overrides else 1
    records = list(read_records(tmp_path / "run"))
    assert [record.step for record in records] == [2, 4, 6]
    for record in records:
        assert (record.ep, record.group, record.blocks) == (ep, group, (1, 3))
        assert record.rows_RME.shape == (world // tp, 2, 4) and record.rows_RME.sum() > 0
        for rank in range(world // tp):
            counted_AME = of_ranks[rank * tp][record.step].reshape(-1, 2, 4)  # micro-batches, layers, experts
            assert np.array_equal(record.rows_RME[rank], counted_AME.sum(0))
    is_even = "model.router=ec" in overrides  # every expert gets as many rows of each image
    assert len({record.rows_RME.tobytes() for record in records}) == (1 if is_even else 3)


@pytest.mark.full
def test_recording_does_not_change_the_training(tmp_path):
    run(2, train, str(tmp_path / "plain"), "parallel.ep=2")
    run(2, train, str(tmp_path / "recorded"), "parallel.ep=2", EVERY_STEP)
    assert losses(tmp_path / "recorded") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / TRACE_FILE).exists()


def dies_at(folder: str, last: int, *overrides: str) -> None:
    """Trains, and is ended in the step after `last` without any clean-up of logs."""
    real = RoutingRecorder.end_step, RoutingRecorder.close

    def end_step(self, applied):
        if self._step == last:
            raise KeyboardInterrupt
        real[0](self, applied)

    RoutingRecorder.end_step, RoutingRecorder.close = end_step, lambda self: None
    try:
        train(folder, *overrides)
    except KeyboardInterrupt:
        pass
    finally:
        RoutingRecorder.end_step, RoutingRecorder.close = real


@pytest.mark.full
def test_a_run_that_dies_and_resumes_has_each_step_once(tmp_path):
    """Saved at step 3 between two log lines; it dies at 5, after it has written step 4. Step 3 is not repeated."""
    settings, folder = ("parallel.ep=2", EVERY_STEP, "train.log_every=4"), tmp_path / "run"
    run(2, train, str(tmp_path / "straight"), *settings)
    run(2, dies_at, str(folder), 5, *settings)
    file = folder / TRACE_FILE
    assert read_trace(file).steps_N.tolist() == [1, 2, 3, 4]
    with file.open("ab") as trace:
        trace.write(b'{"step": 5, "ep": 2, "gro')  # a kill cut off what it wrote
    run(2, train, str(folder), *settings)
    straight, resumed = read_trace(tmp_path / "straight"), read_trace(folder)
    assert resumed.steps_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(resumed.rows_NME, straight.rows_NME)
    assert file.read_bytes() == (tmp_path / "straight" / TRACE_FILE).read_bytes()


@pytest.mark.full
def test_a_damaged_record_is_dropped_at_the_next_start(tmp_path):
    settings, folder = ("parallel.ep=2", EVERY_STEP), tmp_path / "run"
    run(2, train, str(folder), "train.steps=3", *settings)
    file = folder / TRACE_FILE
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"step": 3'))
    with pytest.raises(TraceError, match="line 2: is damaged: its checksum differs"):
        read_trace(folder)
    run(2, train, str(folder), *settings)
    assert read_trace(folder).steps_N.tolist() == [1, 3, 4, 5, 6]


def back_to(folder: str, step: int, *overrides: str) -> None:
    real = loop.train
    loop.train = lambda config, folder, launch: real(config, folder, launch, from_step=step)
    try:
        train(folder, *overrides)
    finally:
        loop.train = real


@pytest.mark.full
def test_going_back_moves_later_records_to_the_branch(tmp_path):
    """Also by a start that records nothing itself, whose steps are others."""
    folder = tmp_path / "run"
    run(2, train, str(folder), "parallel.ep=2", EVERY_STEP)
    kept = read_trace(folder)
    run(2, back_to, str(folder), 3, "parallel.ep=2", "train.steps=4")
    assert read_trace(folder).steps_N.tolist() == [1, 2, 3]
    (branch,) = (folder / "branches").iterdir()
    moved = read_trace(branch / TRACE_FILE)
    assert moved.steps_N.tolist() == [4, 5, 6] and np.array_equal(moved.rows_NME, kept.rows_NME[3:])
    run(1, train, str(folder), EVERY_STEP)  # another layout goes on
    assert [(r.step, r.ep, len(r.rows_RME)) for r in read_records(folder)] == [
        *((1, 2, 2), (2, 2, 2), (3, 2, 2)),
        *((5, 1, 1), (6, 1, 1)),
    ]


def test_a_batch_of_null_images_has_records_without_rows(tmp_path):
    run(2, train, str(tmp_path / "run"), "parallel.ep=2", EVERY_STEP, *NULL)
    trace = read_trace(tmp_path / "run")
    assert trace.steps_N.tolist() == [1, 2, 3, 4, 5, 6] and not trace.rows_NME.any()


@pytest.mark.parametrize("router", ["dense", pytest.param("conditional", marks=pytest.mark.full)])
def test_a_model_without_routed_experts_records_nothing(tmp_path, router):
    run(1, train, str(tmp_path / "run"), EVERY_STEP, f"model.router={router}")
    assert not (tmp_path / "run" / TRACE_FILE).exists() and len(losses(tmp_path / "run")) == 6


def recorded_steps(file: str, applied: list[bool]) -> dict:
    config = small("train.routing_trace_every=2", "train.accumulation=2")
    recorder = RoutingRecorder(config, make_mesh(1, 1, timeout=60), Path(file))
    load_ME = torch.arange(8.0).view(2, 4)
    with Counter() as counter:
        for is_applied in map(torch.tensor, applied):
            for _ in range(2):
                recorder.add(AuxiliaryOutput({}, load_ME, torch.ones(2)))
            recorder.end_step(is_applied)
    before = Path(file).stat().st_size
    recorder.write()
    recorder.write()  # nothing is left
    recorder.close()
    return {"waits": dict(counter.total.waits), "sent": dict(counter.total.collectives), "written before": before}


def test_steps_wait_for_nothing_and_skipped_ones_are_left_out(tmp_path):
    file = tmp_path / TRACE_FILE
    assert run(1, recorded_steps, str(file), [True, True, True, False, True, True]) == [
        {"waits": {}, "sent": {}, "written before": 0}
    ]
    records = list(read_records(file))
    assert [record.step for record in records] == [2, 6]
    assert all(np.array_equal(r.rows_RME, 2 * np.arange(8).reshape(1, 2, 4)) for r in records)
