"""Gradients that are summed straight into each rank's shard, against DeepSpeed's all-reduce of everything."""

import pytest
import torch
import torch.distributed as dist
from support.levels import full
from support.processes import run
from support.trajectory import deviation, small, train, train_compiled_on_rank_0, train_uncompiled
from support.watched_engine import Watched, small_buckets, whole_loss

from megapromoe.config.options import ConfigError
from megapromoe.distributed.reduce_scatter import AsyncReduceScatter

ALL_REDUCE, SCATTER = (f"train.gradient_reduction={value}" for value in ("all_reduce", "reduce_scatter"))


# ---- the collective


def sums(dtype: torch.dtype) -> list[tuple[bool, bool]]:
    """Whether each of two sums under way together is exact, and rounded once."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generators = [torch.Generator().manual_seed(r) for r in range(ranks)]
    inputs = [[torch.randn(ranks * 5, generator=g).to(dtype) for g in generators] for _ in range(2)]
    running = [AsyncReduceScatter(of_ranks[rank], dist.group.WORLD) for of_ranks in inputs]
    results = []
    for of_ranks, reduction in zip(inputs, running, strict=True):
        expected = torch.zeros(5)
        for values in of_ranks:  # in the order of the ranks
            expected += values[5 * rank : 5 * rank + 5].float()
        result = reduction.wait()
        results.append((result.dtype == dtype, torch.equal(result, expected.to(dtype))))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 3])
def test_a_rank_gets_its_part_of_the_sum(world, dtype):
    """In the order of the ranks, so with the same bits each time; bfloat16 is rounded once."""
    assert run(world, sums, dtype) == [[(True, True)] * 2] * world


# ---- training


@pytest.mark.parametrize(
    "zero, overlap, what",
    [
        full(1, True, ("parallel.ep=2", "train.accumulation=2")),
        full(2, True, ("parallel.ep=2", "train.accumulation=2")),
        full(1, False, ("parallel.ep=2",)),
        full(2, False, ("parallel.ep=2",)),
        full(1, True, ("parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true")),
        full(2, True, ("parallel.tp=2", "parallel.ep=4", "train.accumulation=2")),
        full(1, True, ("parallel.ep=2", "train.adamw_backend=fused")),
        full(2, True, ("parallel.ep=2", "train.adamw_backend=fused", "train.accumulation=2")),
        full(1, True, ("model.router=dense",)),
        full(2, True, ("parallel.ep=4", "model.modulation=shared", "data.condition_dropout=0.999999999")),
        full(1, True, ("parallel.ep=2", "train.optimizer=muon")),
        full(2, True, ("parallel.ep=2", "train.optimizer=muon")),
    ],
)
def test_training_equals_that_of_an_all_reduce(tmp_path, zero, overlap, what):
    """Losses, norms, the first gradients, parameters and averages, with many parameter groups and with one."""
    for name in ("reduced", "scattered"):
        (tmp_path / name).mkdir()
    what = (*what, "model.num_experts=8")
    # One case compiles the fused update.
    training = train_uncompiled if "train.accumulation=2" in what else train_compiled_on_rank_0
    reduced = run(4, training, (*what, f"train.deepspeed=fp32_zero{zero}", ALL_REDUCE), str(tmp_path / "reduced"), 3)[0]
    files = (small_buckets(tmp_path, zero, overlap), SCATTER)
    scattered = run(4, training, (*what, *files), str(tmp_path / "scattered"), 3)[0]
    assert scattered.losses == pytest.approx(reduced.losses, rel=1e-6)
    assert scattered.norms == pytest.approx(reduced.norms, rel=1e-5)
    for kind in ("gradients", "parameters", "averages"):
        assert deviation(getattr(scattered, kind), getattr(reduced, kind))[0] <= 1, kind


@pytest.mark.parametrize("zero, top", [full(1, {}), full(2, {"data_types": {"grad_accum_dtype": "fp32"}})])
def test_training_in_bf16_is_near_that_of_an_all_reduce(tmp_path, zero, top):
    """Gradients within the rounding of bfloat16, 2^-8, which an all-reduce does after each addition."""
    results = []
    for name, choice in (("reduced", ALL_REDUCE), ("scattered", SCATTER)):
        (tmp_path / name).mkdir()
        file = small_buckets(tmp_path, zero, bf16={"enabled": True}, **top)
        results.append(run(4, train, ("parallel.ep=2", file, choice), str(tmp_path / name), 2)[0])
    reduced, scattered = results
    assert scattered.losses == pytest.approx(reduced.losses, rel=1e-3)
    for name, gradient in reduced.gradients.items():
        off = (scattered.gradients[name] - gradient).norm()
        assert off <= 2**-7 * gradient.norm(), name


# ---- memory, order, missing gradients


def order_of_reductions(deepspeed: str) -> dict[str, tuple[int, int, int]]:
    """Reductions over the data-parallel ranks and those of experts: parameter groups, reductions before the gradients
    of the third block were complete, and all."""
    watched = Watched("parallel.ep=2", "model.num_experts=8", deepspeed)
    mesh, engine = watched.mesh, watched.engine
    early: list[int] = []
    engine.module.blocks[2].attn.qkv.weight.register_hook(lambda _: early.append(len(watched.sent)))
    watched.backward(whole_loss)
    engine.close()
    groups = {"dp": ("all_to_all_single", mesh.dp.ranks), "edp": ("all_to_all_single", mesh.edp.ranks)}
    return {
        name: (
            sum(engine.layouts[p.pieces[0].name].expert == (name == "edp") for p in engine.partitions if p.pieces),
            watched.sent[: early[0]].count(call),
            watched.sent.count(call),
        )
        for name, call in groups.items()
    }


@pytest.mark.parametrize("zero", [1, 2])
def test_groups_are_reduced_as_they_are_complete(tmp_path, zero):
    """During the backward pass: those of the last blocks before the gradients of an earlier block are computed."""
    for rank in run(4, order_of_reductions, small_buckets(tmp_path, zero)):
        for groups, early, every in rank.values():
            assert 0 < early < every
            assert groups <= every  # a rank may have padding alone in a group


def gradients_held(choice: str) -> tuple[int, int]:
    """The most bytes of gradients that parameters have during a backward pass, and those of all parameters."""
    watched = Watched("parallel.ep=2", choice)
    parameters = list(watched.engine.module.parameters())
    most = [0]

    def measure(_):
        most[0] = max(most[0], sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(measure)
    watched.backward(whole_loss)
    watched.engine.close()
    return most[0], sum(p.nbytes for p in parameters)


def test_stage_1_keeps_no_whole_gradient():
    """A gradient is freed as soon as it is in its bucket; DeepSpeed keeps all until the backward pass ends."""
    (most, every), _ = run(2, gradients_held, SCATTER)
    assert most < 0.2 * every
    (kept, every), _ = run(2, gradients_held, ALL_REDUCE)
    assert kept > 0.9 * every


def after_a_partial_loss(*overrides: str) -> list[tuple[str, int, torch.Tensor]]:
    """The pieces of a rank's masters after a step whose loss does not depend on the last parameters."""
    watched = Watched(*overrides)
    report = watched.backward(lambda _, auxiliary: auxiliary.total())
    watched.engine.step(1e-2, report)
    masters = [
        (piece.name, piece.start, partition.master[piece.offset : piece.offset + piece.stop - piece.start].detach())
        for partition in watched.engine.partitions
        for piece in partition.pieces
    ]
    watched.engine.close()
    return masters


def test_parameters_without_a_gradient_count_as_zero(tmp_path):
    """As with an all-reduce. A group may lack all gradients, or some."""
    reduced, scattered = (
        sorted(
            (piece for rank in run(2, after_a_partial_loss, small_buckets(tmp_path, 1), choice) for piece in rank),
            key=lambda piece: piece[:2],
        )
        for choice in (ALL_REDUCE, SCATTER)
    )
    names = list(dict.fromkeys(name for name, *_ in reduced))
    assert len(names) > 20 and len(scattered) > len(names)
    for name in names:
        tensors = [torch.cat([part for other, _, part in pieces if other == name]) for pieces in (reduced, scattered)]
        torch.testing.assert_close(tensors[1], tensors[0], rtol=1e-6, atol=1e-8)


# ---- refusals


@pytest.mark.parametrize(
    "file, reason",
    [
        ("fp32_zero0", "ZeRO stage 0, which shards no gradients or states; use stage 1 or 2"),
        ("fp32_zero3", "ZeRO stage 3, which always reduce-scatters gradients"),
        ("bf16_zero2_offload", "which offloads the optimizer"),
    ],
)
def test_what_cannot_be_reduce_scattered_is_refused(file, reason):
    small(f"train.deepspeed={file}")  # auto
    with pytest.raises(ConfigError, match=f"train.gradient_reduction = 'reduce_scatter': .*{file}.*{reason}"):
        small(f"train.deepspeed={file}", SCATTER)
