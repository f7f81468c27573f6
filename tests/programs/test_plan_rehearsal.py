"""`megapromoe plan --rehearse`: one rank of a layout on fake tensors, against the plan; and what it refuses."""

import numpy as np
import pytest
from support import processes
from support.levels import full
from support.placements import placement_file

from megapromoe import cli
from megapromoe.benchmark.rehearsal import Comparison, Messages, RehearsalError, compare, parts, rehearse_model
from megapromoe.benchmark.rehearsed_update import rehearse_update, small_width
from megapromoe.commands import plan_rehearsal
from megapromoe.commands.plan_rehearsal import in_new_process, shares_of
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.planning.traffic import Collective

S = ("data.source=synthetic", "model.depth=2", "model.num_experts=8", "train.global_batch=1024")
BLOCKS = ("model.activation=swiglu", "model.norm=rms", "model.qk_norm=rms", "model.positions=rope")
TEXT = ("data.source=unset", "model.condition=text", "model.text_width=48", "model.text_tokens=40")
SEVERAL = ("model.num_shared_experts=3", "model.shared_expert_width=64", "model.num_unconditional_experts=2")


@pytest.fixture(autouse=True)
def from_the_server(monkeypatch):
    """New processes fork from the server of the workers, which has imported everything."""
    processes.start_server()
    monkeypatch.setattr(plan_rehearsal, "CONTEXT", processes.context)


CASES = [
    (512, 77, ("parallel.tp=2", "parallel.ep=8", "model.num_experts=12")),  # 2 experts or 1 a rank
    full(512, 0, ("parallel.tp=2", "parallel.ep=8", "model.num_experts=12", "train.accumulation=2")),
    full(256, 255, ("parallel.ep=8", "train.deepspeed=fp32_zero2")),
    full(64, 3, ("parallel.tp=2", "parallel.ep=4", "parallel.expert_tp=true", "parallel.recompute=all")),
    full(64, 3, ("parallel.tp=4", "parallel.ep=2", "parallel.recompute=blocks", "model.heads=8")),  # tp > ep
    full(64, 3, ("parallel.ep=8", "parallel.recompute=moe", "model.capacity_factor=1.5")),
    full(64, 1, ("parallel.tp=2", "model.router=dense", "model.qk_norm=layer")),
    full(64, 1, ("parallel.tp=2", "model.router=conditional")),
    full(64, 9, ("parallel.ep=8", "model.router=promoe_ec", *SEVERAL)),
    full(64, 9, ("parallel.ep=8", "model.router=tc", "model.balance_weight=0.1", "model.top_k=2")),
    full(64, 9, ("parallel.ep=8", "model.router=kmeans", *BLOCKS)),
    full(64, 9, ("parallel.ep=8", "model.router=gmm", "train.optimizer=muon")),
    full(64, 9, ("parallel.ep=8", "model.router=classification")),
    full(64, 9, ("parallel.tp=2", "parallel.ep=4", *TEXT, *BLOCKS, "model.text_ffn=96")),
]


@pytest.mark.parametrize("world, rank, what", CASES, ids=str)
def test_messages_and_memory_are_those_planned(world, rank, what):
    """Calls and bytes exactly, what is kept within 2 %, the peak not above the plan and not far below."""
    config = resolve(overrides=(*S, *what), world=world)
    model = in_new_process(rehearse_model, config, world, rank)
    assert [c for c in model.messages if not c.agrees] == []
    assert bool(model.messages) == (config.model.router not in ("dense", "conditional") or config.parallel.tp > 1)
    assert model.planned_kept == pytest.approx(model.kept, rel=0.02)
    assert 0.75 * model.planned_peak < model.peak < 1.05 * model.planned_peak


UPDATES = [
    (4096, 5, ("parallel.ep=8",)),
    full(64, 63, ("parallel.tp=2", "parallel.ep=8", "model.num_experts=12", "train.deepspeed=bf16_zero2")),
    full(64, 3, ("parallel.ep=4", "train.accumulation=2", "train.deepspeed=fp32_zero2")),
    full(64, 3, ("parallel.tp=2", "parallel.ep=4", "parallel.expert_tp=true", "train.deepspeed=fp32_zero0")),
    full(4096, 13, ("parallel.ep=4", "parallel.shard_ranks=8")),
    full(64, 62, ("parallel.ep=8", "parallel.shard_ranks=4", "train.accumulation=2", "train.deepspeed=bf16_zero2")),
    full(64, 3, ("parallel.tp=2", "model.router=dense")),
    full(64, 3, ("parallel.ep=2", "model.balance_bias=0.01", *SEVERAL)),
    full(64, 9, (*TEXT, "model.text_ffn=96", "parallel.ep=4")),
]


@pytest.mark.parametrize("world, rank, what", UPDATES, ids=str)
def test_messages_of_the_update_are_those_planned(world, rank, what):
    config = resolve(overrides=(*S, "train.global_batch=4096", *what), world=world)
    update = in_new_process(rehearse_update, config, world, rank)
    assert update.messages and [c for c in update.messages if not c.agrees] == []
    assert sum(c.rehearsed.payload for c in update.messages) > 1e5


def test_stage_3_is_left_out():
    config = resolve(overrides=(*S, "train.deepspeed=fp32_zero3"), world=8)
    assert rehearse_update(config, 8, 0) is None


@pytest.mark.full
def test_experts_that_are_placed(tmp_path):
    """On a rank with more experts than the mean, and with the shares of a trace."""
    file = placement_file(tmp_path, 12, 4, blocks=(1,))
    what = ("parallel.ep=4", "model.num_experts=12", f"parallel.placement={file}")
    config = resolve(overrides=(*S, *what), world=8)
    shares = [[1 / 12] * 12] * len(config.model.moe_blocks)
    for rank in (0, 3):
        model = in_new_process(rehearse_model, config, 8, rank, shares)
        assert [c for c in model.messages if not c.agrees] == []
        assert model.planned_kept == pytest.approx(model.kept, rel=0.02)
    update = in_new_process(rehearse_update, config, 8, 3)
    assert [c for c in update.messages if not c.agrees] == []


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "moe"])
def test_experts_that_have_copies(tmp_path, recompute):
    """The messages of a rank with the fewest copies, of none, and of one that owns copied experts; and what is kept."""
    file = placement_file(tmp_path, 12, 4, blocks=(1,), copies=True)
    what = ("parallel.ep=4", "model.num_experts=12", f"parallel.placement={file}", f"parallel.recompute={recompute}")
    config = resolve(overrides=(*S, *what), world=8)
    (placement,) = config.placements_in_file().values()
    assert not placement.copies_of_rank[3] and placement.replica_slots
    fullest = max(range(4), key=lambda rank: len(placement.copies_of_rank[rank]))
    for rank in (fullest, 3):
        model = in_new_process(rehearse_model, config, 8, rank)
        assert [c for c in model.messages if not c.agrees] == []
        if rank == fullest:
            assert model.planned_kept == pytest.approx(model.kept, rel=0.02)


@pytest.mark.parametrize("expert, fullness", [(0, 4.0), (7, 0.0)])
def test_rows_follow_the_given_shares(expert, fullness):
    """Rank 0 has the experts 0 and 1 of 8: all rows come to it, or none."""
    config = resolve(overrides=(*S, "parallel.ep=4"), world=8)
    shares = np.eye(8)[expert].tolist()
    model = in_new_process(rehearse_model, config, 8, 0, [shares] * len(config.model.moe_blocks))
    assert model.fullness == fullness
    assert [c for c in model.messages if not c.agrees] == []
    assert model.planned_kept == pytest.approx(model.kept, rel=0.02)


def test_a_trace_gives_the_shares(tmp_path):
    from megapromoe.routing_trace import TraceRecord, encode

    rows = np.array([[[6, 2], [0, 0]], [[0, 0], [0, 0]]])
    file = tmp_path / "routing_trace.jsonl"
    file.write_bytes(encode(TraceRecord(step=10, blocks=(1, 3), rows_RME=rows, ep=2, group=2)))
    assert shares_of(file) == [[0.75, 0.25], [0.5, 0.5]]


def test_parts_have_the_sum():
    assert parts(10, [1 / 3] * 3) == [3, 4, 3]
    assert parts(7, [0.0, 1.0, 0.0]) == [0, 7, 0] and parts(0, [0.5, 0.5]) == [0, 0]
    assert sum(parts(85, np.random.default_rng(0).random(12))) == 85


def test_the_small_model_keeps_what_a_layout_needs():
    config = resolve("promoe_t2i_12b", overrides=("parallel.tp=8", "parallel.ep=4"), world=64)
    small = small_width(config)
    assert small.model.hidden_size == 8 * config.model.heads
    assert (small.model.depth, small.model.num_experts) == (config.model.depth, config.model.num_experts)
    assert small.parallel == config.parallel


def messages(*lines: Collective, measured: dict) -> tuple[Comparison, ...]:
    groups = {"world": (0, 1, 2, 3), "tp": (0,), "dp": (0, 1, 2, 3), "ep": (0, 1), "edp": (0, 2)}
    return compare(measured, list(lines), Mesh(**{name: Group(ranks, 0) for name, ranks in groups.items()}))


def test_differences_are_seen():
    planned = Collective("x", "all_reduce", "ep", 2, 3, 100.0, "forward")
    same = messages(planned, measured={("all_reduce", (0, 1)): [3, 300]})
    assert [c.agrees for c in same] == [True]
    for other in ([2, 300], [3, 301]):
        assert [c.agrees for c in messages(planned, measured={("all_reduce", (0, 1)): other})] == [False]
    unplanned = messages(planned, measured={("all_reduce", (0, 1)): [3, 300], ("all_gather", (0, 2)): [1, 8]})
    assert {(c.planned.over, c.agrees) for c in unplanned} == {("ep", True), ("edp", False)}
    assert [c.agrees for c in messages(planned, measured={})] == [False]
    # Groups with the same ranks are one line.
    both = (
        Collective("y", "all_reduce", "dp", 4, 1, 8.0, "update"),
        Collective("z", "all_reduce", "world", 4, 1, 16.0, "update"),
    )
    (line,) = messages(*both, measured={("all_reduce", (0, 1, 2, 3)): [2, 24]})
    assert line.agrees and line.planned == Messages("all_reduce", "dp, world", 4, 2, 24.0)


@pytest.mark.parametrize(
    "rank, what, shares, message",
    [
        (8, (), None, "rank 8: must be 0 to 7"),
        (0, ("model.router=diffmoe",), None, "model.router=tc"),
        (0, (), [[0.5, 0.5]], "1 MoE layers and 8 experts"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(rank, what, shares, message):
    config = resolve(overrides=(*S, *what), world=8)
    with pytest.raises(RehearsalError, match=message):
        rehearse_model(config, 8, rank, shares)


PLAN = ("plan", "--preset", "digits", "--gpus-per-node", "4", "parallel.ep=2", "parallel.tp=2")


@pytest.mark.full
def test_the_command_prints_both_tables(capsys):
    assert cli.main([*PLAN, "--rehearse", "3"]) == 0
    out = capsys.readouterr().out
    assert "rehearsal of rank 3 of 4" in out and "kept for the backward pass" in out
    assert "all_to_all      ep" in out and "differs" not in out


def test_the_command_fails_if_the_plan_differs(capsys, monkeypatch):
    real = plan_rehearsal.in_new_process

    def wrong(function, *arguments):
        result = real(function, *arguments)
        if function is rehearse_model:
            result = result.__class__(**{**vars(result), "peak": result.peak * 2})
        return result

    monkeypatch.setattr(plan_rehearsal, "in_new_process", wrong)
    assert cli.main([*PLAN, "--rehearse", "3"]) == 1
    assert "differ in the peak of the activations" in capsys.readouterr().err


def test_wrong_options_are_refused(capsys, tmp_path):
    for more, message in (
        (["--rehearse", "4"], "rank 4: must be 0 to 3"),
        (["--trace", str(tmp_path)], "add --rehearse RANK"),
        (["--rehearse", "0", "--trace", str(tmp_path)], "routing_trace"),
    ):
        assert cli.main([*PLAN, *more]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*PLAN, "--rehearse", "-1"])
    assert "whole number" in capsys.readouterr().err
