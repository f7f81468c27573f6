"""Optimizer states that are divided over some of the ranks, as those of a node, against those over all ranks."""

import pytest
import torch
from support.levels import full
from support.processes import run
from support.trajectory import deviation, small, train_uncompiled
from support.watched_engine import Watched, small_buckets, whole_loss

from megapromoe.config.options import ConfigError

TWO = "parallel.shard_ranks=2"
EIGHT = "model.num_experts=8"


@pytest.mark.parametrize(
    "zero, overlap, what",
    [
        full(2, True, ("train.accumulation=2",)),
        full(1, True, ("train.accumulation=2", "parallel.ep=2")),
        full(1, False, ()),
        full(2, False, ("parallel.ep=2", "train.accumulation=2")),
        full(1, True, ("parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true")),
        full(2, True, ("parallel.ep=4", "model.modulation=shared", "data.condition_dropout=0.999999999")),
        full(1, True, ("train.adamw_backend=fused",)),
        full(1, True, ("model.router=dense",)),
        full(1, True, ("train.optimizer=muon",)),
        full(2, True, ("parallel.ep=2", "train.optimizer=muon", "train.adamw_backend=fused")),
    ],
)
def test_training_equals_that_of_an_all_reduce(tmp_path, zero, overlap, what):
    """Losses, norms, the first gradients, parameters and averages, with many parameter groups and with one."""
    for name in ("reduced", "scattered"):
        (tmp_path / name).mkdir()
    what = (*what, EIGHT)
    plain = (*what, f"train.deepspeed=fp32_zero{zero}", "train.gradient_reduction=all_reduce")
    reduced = run(4, train_uncompiled, plain, str(tmp_path / "reduced"), 3)[0]
    divided = (*what, small_buckets(tmp_path, zero, overlap), "train.gradient_reduction=reduce_scatter", TWO)
    scattered = run(4, train_uncompiled, divided, str(tmp_path / "scattered"), 3)[0]
    assert scattered.losses == pytest.approx(reduced.losses, rel=1e-6)
    assert scattered.norms == pytest.approx(reduced.norms, rel=1e-5)
    for kind in ("gradients", "parameters", "averages"):
        assert deviation(getattr(scattered, kind), getattr(reduced, kind))[0] <= 1, kind


def trained_pieces(*overrides: str) -> list[tuple[tuple, bool, list[torch.Tensor]]]:
    """What each piece of a rank is, whether the rank saves it, and its master and moments after three steps."""
    watched = Watched(*overrides)
    engine, mesh, accumulation = watched.engine, watched.mesh, watched.engine.config.train.accumulation
    for _ in range(3):
        for micro in range(accumulation):
            report = watched.backward(whole_loss)
            if micro < accumulation - 1:
                engine.finish_micro_step()
        with torch.compiler.set_stance("force_eager"):
            engine.step(1e-2, report)
    pieces = []
    for partition in engine.partitions:
        for piece in partition.pieces:
            layout, span = engine.layouts[piece.name], slice(piece.offset, piece.offset + piece.stop - piece.start)
            part = (mesh.ep.rank, mesh.tp.rank) if layout.expert else (0, mesh.tp.rank)
            states = [partition.master.detach(), *engine.moments(partition).values()]
            key = (piece.name, piece.start, piece.stop, *part)
            pieces.append((key, engine.is_writer(piece.name), [state[span].clone() for state in states]))
    engine.close()
    return pieces


@pytest.mark.parametrize(
    "zero, what, top",
    [
        (1, ("parallel.ep=2", "train.accumulation=2"), {}),
        full(2, ("train.accumulation=2",), {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        full(1, ("parallel.ep=2", "train.optimizer=muon", "train.gradient_reduction=reduce_scatter"), {}),
        full(1, ("parallel.tp=2", "train.accumulation=2"), {}),
        full(2, ("train.adamw_backend=fused",), {"bf16": {"enabled": True}}),
    ],
)
def test_replicas_have_equal_bits_and_one_of_them_saves(tmp_path, zero, what, top):
    """The ranks that have the same part of a parameter: masters and moments after steps, and who writes them."""
    results = run(4, trained_pieces, *what, EIGHT, TWO, small_buckets(tmp_path, zero, **top))
    replicas: dict[tuple, list] = {}
    for rank in results:
        for key, writes, states in rank:
            replicas.setdefault(key, []).append((writes, states))
    with_tp = "parallel.tp=2" in what
    assert len(replicas) > 20
    for key, pieces in replicas.items():
        assert len(pieces) == 2, key
        for state, other in zip(pieces[0][1], pieces[1][1], strict=True):
            assert torch.equal(state, other), key
        if not with_tp:  # with tp, a replicated parameter has one writer in the tp group
            assert [writes for writes, _ in pieces] in ([True, False], [False, True]), key


def reductions(*overrides: str) -> dict[str, tuple[int, int, int, int]]:
    """Sums over the ranks of shards and of replicas in two micro-steps.

    Number in the first micro-step; of the second one those before the gradients of the third block were complete, and
    all; and the parameter groups.
    """
    watched = Watched(*overrides, "train.accumulation=2", EIGHT)
    mesh, engine, marks = watched.mesh, watched.engine, []
    engine.module.blocks[2].attn.qkv.weight.register_hook(lambda _: marks.append(len(watched.sent)))
    watched.backward(whole_loss)
    engine.finish_micro_step()
    first = len(watched.sent)
    watched.backward(whole_loss)
    engine.close()
    result = {}
    for kind, expert in (("dp", False), ("edp", True)):
        groups = sum(engine.layouts[p.pieces[0].name].expert == expert for p in engine.partitions if p.pieces)
        shards, replicas = mesh.shard_group(expert).ranks, mesh.replica_group(expert).ranks
        for name, call in (("shards", ("all_to_all_single", shards)), ("replicas", ("all_reduce", replicas))):
            numbers = [part.count(call) for part in (watched.sent[:first], watched.sent[first : marks[1]])]
            result[f"{kind} {name}"] = (*numbers, watched.sent[first:].count(call), groups)
    return result


@pytest.mark.parametrize("zero", [1, full(2)])
def test_shards_are_summed_over_replicas_beside_the_last_backward_pass(tmp_path, zero):
    """Those of the last blocks before the gradients of an earlier one are computed; earlier micro-batches sum none."""
    for rank in run(4, reductions, small_buckets(tmp_path, zero), TWO):
        for name, (first, early, every, groups) in rank.items():
            # All to alls and sums of the model itself are over other ranks, but dp and edp have the same here.
            assert 0 < early < every and groups <= every, name
            assert (first > 0) == (zero == 2 and name.endswith("shards")), name


@pytest.mark.parametrize(
    "settings, reason",
    [
        (("train.deepspeed=fp32_zero0",), "ZeRO stage 0, which divides no states; use stage 1 or 2, or parallel"),
        (("train.deepspeed=fp32_zero3",), "ZeRO stage 3, which divides the parameters over all ranks; use stage 1 or"),
        (("train.deepspeed=bf16_zero2_offload",), "which offloads the optimizer; use a file without"),
        (("train.gradient_reduction=all_reduce",), "'all_reduce', where .*; use train.gradient_reduction=reduce_sc"),
        (("train.optimizer=muon",), "'auto' and train.optimizer = 'muon', where DeepSpeed .*; use train.gradient_red"),
    ],
)
def test_what_divides_states_otherwise_is_refused(settings, reason):
    small(*settings)
    with pytest.raises(ConfigError, match=f"parallel.shard_ranks = 2: is not supported with train.*{reason}"):
        small(*settings, TWO)
