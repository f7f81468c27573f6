"""No rank holds more than its share of the state and one tensor: when a run starts, saves and loads."""

from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import state, train
from support.trajectory import small

import megapromoe.checkpoint.manager as checkpoint_module
from megapromoe.benchmark.counters import Counter
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.manager import CheckpointManager, resume
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.step_folders import folder_of, steps_in
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.deepspeed_backend import partitions
from megapromoe.engine.engine import Engine

SIZE = ("model.hidden_size=128", "model.depth=4", "model.num_experts=4", "train.save_in_background=false")


def start(counter: Counter, tp: int, ep: int, file: str, *more: str) -> tuple[Engine, EMA, dict[str, int]]:
    """An engine and its averages, and the bytes that were held at most, of the rank's share, of the largest tensor.

    The share is the parameters, and of each master the two moments and the average.
    """
    config = small(*SIZE, f"parallel.tp={tp}", f"parallel.ep={ep}", f"train.deepspeed={file}", *more)
    mesh = make_mesh(tp, ep, timeout=60)
    before = counter.mark()
    engine = Engine.new(config, mesh, "cpu")
    ema = EMA(engine, config.train.ema_decays)
    share = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    for partition in engine.partitions:
        share += 4 * partition.master.numel() * (1 + len(engine.moments(partition)) + len(ema.decays))
    tensor = max(4 * torch.Size(layout.shape).numel() for layout in engine.layouts.values())
    return engine, ema, {"peak": counter.peak(before), "share": share, "tensor": tensor}


def one_job(folder: str, file: str) -> dict[str, dict[str, int]]:
    """Starts, saves and loads with data parallelism alone, then loads at another layout."""
    root, measured = Path(folder) / "checkpoints", {}
    root.mkdir(exist_ok=True)
    partitions.GATHERED = 1 << 14  # as small against these tensors as it is against those of real models
    with Counter() as counter:
        engine, ema, measured["start"] = start(counter, 1, 1, file)
        manager, before = CheckpointManager(root, engine, ema, commit_timeout=60), counter.mark()
        manager.save({"step": 1, "updates": 1})
        measured["save"] = {"peak": counter.peak(before)}
        assert manager.failures == 0, manager._problem
        before = counter.mark()
        resume(root, engine, ema)
        measured["load"] = {"peak": counter.peak(before)}
        engine.close()
        del engine, ema, manager
        engine, ema, measured["other start"] = start(counter, 2, 2, file)
        before = counter.mark()
        resume(root, engine, ema)
        measured["other load"] = {"peak": counter.peak(before)}
        engine.close()
    return measured


@pytest.mark.parametrize("file", [full("bf16_zero1"), full("fp32_zero2")])
def test_a_rank_never_holds_more_than_its_share_and_one_tensor(file, tmp_path):
    for measured in run(4, one_job, str(tmp_path), file):
        tensor = measured["start"]["tensor"]
        for of in ("start", "other start"):
            assert measured[of]["peak"] <= measured[of]["share"] + tensor, of
        for of in ("save", "load", "other load"):
            assert measured[of]["peak"] <= tensor, of
    Checkpoint(folder_of(tmp_path / "checkpoints", 1)).verify()


# ---- saves without a copy


@pytest.mark.full
def test_a_save_without_a_copy_is_the_same(tmp_path):
    for name, background in (("copied", "true"), ("direct", "false")):
        run(2, train, str(tmp_path / name), "parallel.ep=2", f"train.save_in_background={background}")
    expected, direct = state(tmp_path / "copied", 6), state(tmp_path / "direct", 6)
    assert expected.keys() == direct.keys()
    assert all(torch.equal(direct[key], tensor) for key, tensor in expected.items())


def failed_saves(folder: str) -> list[int]:
    """The failures that are counted after each of two saves whose commit fails; the second ends the run."""
    config = small("train.save_in_background=false", "train.max_failed_saves=2")
    engine = Engine.new(config, make_mesh(timeout=60), "cpu")
    manager = CheckpointManager(Path(folder), engine, EMA(engine, config.train.ema_decays), commit_timeout=60)

    def commit(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoint_module.commit = commit
    counts = []
    for step in (1, 2):
        try:
            manager.save({"step": step, "updates": step})
        except CheckpointError as error:
            assert "2 checkpoints in a row" in str(error) and "No space left" in str(error)
        counts.append(manager.failures)
    engine.close()
    return counts


def test_a_save_without_a_copy_may_fail(tmp_path):
    assert run(2, failed_saves, str(tmp_path)) == [[1, 2]] * 2
    assert not steps_in(tmp_path)
