"""The engine beyond equality: accumulation, non-finite steps, bf16, refused configurations, prototypes over ranks."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.levels import full
from support.processes import run
from support.trajectory import deviation, small, stir, train

from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.deepspeed_backend import internals, start, step
from megapromoe.engine.engine import Engine
from megapromoe.engine.protocol import EngineError
from megapromoe.nn.parallelize import build


def engine_of(*overrides: str) -> tuple[Engine, EMA]:
    config = small(*overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, config.parallel.expert_tp, timeout=60)
    model = build(config, mesh)
    stir(model, mesh)
    engine = Engine(model, config, mesh)
    return engine, EMA(engine, config.train.ema_decays)


def one_step(engine: Engine, spoil=lambda loss: loss, seed: int = 0, lr: float | torch.Tensor = 1e-2):
    """A step on random input, the same for the ranks of a tp group; `spoil` may break the loss."""
    g = torch.Generator().manual_seed(1000 * seed + engine.mesh.dp.rank)
    B = engine.config.layout(engine.mesh.world_size).micro_batch
    x, t = torch.randn(B, 4, 8, 8, generator=g), 1000 * torch.rand(B, generator=g)
    y = torch.randint(10, (B,), generator=g)
    y[-1] = 10

    def loss(prediction, auxiliary):
        total = spoil(prediction[:, :4].float().square().mean() + auxiliary.total())
        return total, total.detach()

    report = engine.micro_step(x, t, y, B - 1, loss=loss)
    return engine.step(lr, report), report


def weights(engine: Engine) -> list[torch.Tensor]:
    return [p.master.detach().clone() for p in engine.partitions]


# ---- accumulation


def test_accumulation_does_not_change_losses_of_single_samples(tmp_path):
    """Without losses over a batch (RCL), two micro-batches are one batch."""
    what = ("model.rcl_weight=0",)
    results = []
    for name, more in (("one", ()), ("two", ("train.accumulation=2",))):
        (tmp_path / name).mkdir()
        results.append(run(2, train, (*what, *more, "parallel.ep=2"), str(tmp_path / name), 3)[0])
    first, second = results
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    assert second.norms == pytest.approx(first.norms, rel=1e-5)
    assert deviation(second.gradients, first.gradients)[0] <= 1
    assert deviation(second.parameters, first.parameters)[0] <= 1


@pytest.mark.full
def test_scope_rank_takes_the_statistics_of_one_rank(tmp_path):
    """With `batch_scope=rank`, two ranks train like one that takes their batches one after the other."""
    results = []
    for name, world, more in (("ranks", 2, ()), ("turns", 1, ("train.accumulation=2",))):
        (tmp_path / name).mkdir()
        results.append(run(world, train, ("model.batch_scope=rank", *more), str(tmp_path / name), 3)[0])
    ranks, turns = results
    assert ranks.losses == pytest.approx(turns.losses, rel=1e-5)
    assert deviation(ranks.parameters, turns.parameters)[0] <= 1
    (tmp_path / "global").mkdir()
    other = run(2, train, (), str(tmp_path / "global"), 3)[0]
    assert other.losses != pytest.approx(ranks.losses, rel=1e-4), "the scope makes no difference"


# ---- steps that must not be taken


def spoiled(file: str, tp: int, ep: int, kind: str, *overrides: str) -> dict:
    engine, ema = engine_of(f"parallel.tp={tp}", f"parallel.ep={ep}", f"train.deepspeed={file}", *overrides)
    result, _ = one_step(engine)
    ema.update(result)
    before, averages = weights(engine), [average.clone() for average in ema.averages[0]]

    def spoil(loss):
        if dist.get_rank() // tp != 0:  # one data-parallel rank only
            return loss
        return loss * float("nan") if kind == "nan" else loss * float("inf")

    bad, _ = one_step(engine, spoil, seed=1)
    ema.update(bad)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    unchanged &= all(torch.equal(a, b) for a, b in zip(averages, ema.averages[0], strict=True))
    good, _ = one_step(engine, seed=2)
    moved = any(not torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    finite = all(w.isfinite().all() for w in weights(engine))
    engine.close()
    return {
        "bad": bad.applied,
        "unchanged": unchanged,
        "good": good.applied,
        "moved": moved,
        "finite": bool(finite),
    }


@pytest.mark.parametrize("kind", ["nan", full("inf")])
@pytest.mark.parametrize(
    "file",
    [
        *(full("fp32_zero0"), "fp32_zero1", full("fp32_zero2"), full("fp32_zero3")),
        *(full("bf16_zero1"), "bf16_zero2", full("bf16_zero3")),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_rank(file, kind):
    for result in run(4, spoiled, file, 2, 2, kind):
        assert result == {"bad": False, "unchanged": True, "good": True, "moved": True, "finite": True}


def spoiled_fused(file: str, kind: str) -> dict:
    with torch.compiler.set_stance("force_eager"):  # spares the minutes of the compiler
        return spoiled(file, 2, 2, kind, "train.adamw_backend=fused")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("file", ["fp32_zero1", "bf16_zero2", "bf16_zero3"])
def test_a_fused_update_is_skipped_too(file, kind):
    for result in run(4, spoiled_fused, file, kind):
        assert result == {"bad": False, "unchanged": True, "good": True, "moved": True, "finite": True}


# ---- the fused update


def rates_as_tensors(file: str) -> list[torch.Tensor]:
    """Weights after two steps, with rates as numbers and as tensors."""
    results = []
    with torch.compiler.set_stance("force_eager"):
        for make in (float, lambda rate: torch.tensor(rate, dtype=torch.float64)):
            engine, _ = engine_of("train.adamw_backend=fused", f"train.deepspeed={file}")
            for seed, rate in enumerate((1e-2, 3e-3)):
                one_step(engine, seed=seed, lr=make(rate))
            results.append(torch.cat(weights(engine)))
            engine.close()
    return results


def test_the_rate_of_a_fused_update_may_be_a_tensor():
    """As a captured update needs it."""
    numbers, tensors = run(1, rates_as_tensors, "fp32_zero1")[0]
    assert torch.equal(numbers, tensors)


def test_gradients_in_order_are_not_copied():
    memory = torch.arange(10.0)
    parts = [memory[0:4].view(2, 2), memory[4:5], memory[5:10]]
    view = step.joined(parts, 7)
    assert view.data_ptr() == memory.data_ptr() and torch.equal(view, memory[:7])
    for others in ([parts[0], parts[2]], [parts[1], parts[0]], [memory[0:4], torch.arange(4.0, 9.0)]):
        copy = step.joined(others, 5)
        assert copy.data_ptr() != memory.data_ptr()
        assert torch.equal(copy, torch.cat([part.reshape(-1) for part in others])[:5])
    with pytest.raises(AssertionError, match="9 of 10 elements have a gradient"):
        step.joined([parts[0], parts[2]], 10)


# ---- bf16


def bf16_start(zero: int) -> dict:
    overrides = ("parallel.tp=2", "parallel.ep=2", f"train.deepspeed=bf16_zero{zero}")
    config = small(*overrides)
    mesh = make_mesh(2, 2)
    exact = {n: p.detach().clone() for n, p in build(config, mesh).named_parameters()}
    engine = Engine(build(config, mesh), config, mesh)
    held = True
    for partition in engine.partitions:
        for p in partition.pieces:
            master = partition.master.detach()[p.offset : p.offset + p.stop - p.start]
            held &= torch.equal(master, exact[p.name].view(-1)[p.start : p.stop])
    dtypes = {p.dtype for p in engine.module.parameters()}
    losses = [float(one_step(engine, seed=0)[1]) for _ in range(8)]
    engine.close()
    return {"exact": bool(held), "dtypes": dtypes, "losses": losses}


@pytest.mark.parametrize("zero", [full(1), 2, full(3)])
def test_bf16_keeps_exact_masters_and_learns(zero):
    for result in run(4, bf16_start, zero):
        assert result["exact"], "masters were rounded to bf16"
        assert result["dtypes"] == {torch.bfloat16}
        assert result["losses"][-1] < 0.9 * result["losses"][0]


@pytest.mark.full
def test_bf16_follows_fp32(tmp_path):
    """bf16 at tp 2 × ep 2 stays within bf16's digits of fp32 on one process."""
    for name in ("fp32", "bf16"):
        (tmp_path / name).mkdir()
    fp32 = run(1, train, ("train.deepspeed=fp32_zero1",), str(tmp_path / "fp32"), 5)[0]
    bf16 = run(4, train, ("train.deepspeed=bf16_zero1", "parallel.tp=2", "parallel.ep=2"), str(tmp_path / "bf16"), 5)[0]
    assert bf16.losses == pytest.approx(fp32.losses, rel=2e-2)


# ---- masters that are written


def written_masters(file: str) -> list[set[float]]:
    """The values of the parameters that this rank has whole, after its masters were set to a number, three times."""
    engine, _ = engine_of("parallel.tp=2", f"train.deepspeed={file}")
    values = []
    for number in (1.0, 2.0, 3.0):
        with torch.no_grad():
            for partition in engine.partitions:
                partition.master.fill_(number)
        engine.sync_parameters_from_masters()
        pieces = [p.detach().flatten() for p in engine.module.parameters() if p.numel()]
        values.append(set(torch.cat(pieces).tolist()))
    engine.close()
    return values


@pytest.mark.parametrize("file", [full("fp32_zero3"), "fp32_zero1", full("bf16_zero3")])
def test_parameters_follow_their_masters_each_time(file):
    for values in run(4, written_masters, file):
        assert values == [{1.0}, {2.0}, {3.0}]


# ---- what must stay equal over ranks


def prototypes_everywhere(zero: int) -> list[torch.Tensor]:
    engine, _ = engine_of("parallel.tp=2", "parallel.ep=2", f"train.deepspeed=fp32_zero{zero}")
    for seed in range(5):
        one_step(engine, seed=seed)
    named = dict(engine.module.named_parameters())
    out = [named[f"blocks.{i}.mlp.router.prototypes"].detach().clone() for i in (1, 3)]
    engine.close()
    return out


@pytest.mark.parametrize("zero", [full(0), full(1), 2])
def test_prototypes_stay_equal_over_data_and_tensor_ranks(zero):
    first, *others = run(4, prototypes_everywhere, zero)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


# ---- gradients are reduced while others are computed


def small_buckets(folder, stage: int, overlap: bool) -> str:
    """A DeepSpeed file whose buckets are smaller than an expert bank (8,192 elements), and hold several others."""
    zero = {"stage": stage, "reduce_bucket_size": 3000, "overlap_comm": overlap, "reduce_scatter": True}
    path = folder / f"stage{stage}-{overlap}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True}))
    return f"train.deepspeed={path}"


@pytest.mark.full
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("zero", [1, 2])
def test_the_size_of_buckets_changes_nothing(tmp_path, zero, overlap):
    layout = ("parallel.ep=2", "model.num_experts=8")
    for name in ("large", "split"):
        (tmp_path / name).mkdir()
    layout = (*layout, "train.gradient_reduction=all_reduce")  # test_gradient_scatter.py has the other way
    large = run(4, train, (*layout, f"train.deepspeed=fp32_zero{zero}"), str(tmp_path / "large"), 3)[0]
    split = run(4, train, (*layout, small_buckets(tmp_path, zero, overlap)), str(tmp_path / "split"), 3)[0]
    assert split.losses == pytest.approx(large.losses, rel=1e-6)
    for name, gradient in large.gradients.items():
        torch.testing.assert_close(split.gradients[name], gradient, rtol=1e-5, atol=1e-7)


def reductions_before(deepspeed: str) -> tuple[int, int]:
    """All-reduces of expert gradients: those called before the third block's gradients were there, and all."""
    engine, _ = engine_of("parallel.ep=2", "model.num_experts=8", deepspeed, "train.gradient_reduction=all_reduce")
    group, real, called, first = engine.mesh.edp.process_group, dist.all_reduce, [0], []

    def counted(tensor, *arguments, **named):
        called[0] += named.get("group") is group
        return real(tensor, *arguments, **named)

    engine.module.blocks[2].attn.qkv.weight.register_hook(lambda _: first.append(called[0]))
    dist.all_reduce = counted
    try:
        one_step(engine)
    finally:
        dist.all_reduce = real
    engine.close()
    return first[0], called[0]


def test_expert_gradients_are_reduced_during_the_backward_pass(tmp_path):
    for early, every in run(4, reductions_before, small_buckets(tmp_path, 1, True)):
        assert 0 < early < every


# ---- refusals


def engine_of_a_changed_file(path: str, content: dict) -> None:
    """An engine whose DeepSpeed file was changed after its configuration was read."""
    config = small(f"train.deepspeed={path}")
    Path(path).write_text(json.dumps(content))
    mesh = make_mesh()
    Engine(build(config, mesh), config, mesh)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "train.deepspeed = .*stage 0"),
        ({"fp16": {"enabled": True}}, "train.deepspeed = .*'fp16' is not supported"),
    ],
)
def test_an_engine_refuses_unsupported_deepspeed_files_too(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_text("{}")
    with pytest.raises(AssertionError, match=message):
        run(1, engine_of_a_changed_file, str(path), content)


def test_missing_apex_is_named():
    try:
        import apex  # noqa: F401
    except ImportError:
        with pytest.raises(
            AssertionError, match="EngineError: train.adamw_backend = apex: NVIDIA apex is not installed"
        ):
            run(1, engine_of, "train.adamw_backend=apex")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_deepspeeds_optimizer_needs_a_gpu():
    with pytest.raises(AssertionError, match="EngineError: train.adamw_backend = deepspeed: its FusedAdam needs a GPU"):
        run(1, engine_of, "train.adamw_backend=deepspeed")


# ---- DeepSpeed's internals


@pytest.mark.full
def test_the_engine_is_imported_without_deepspeed():
    """The engine imports only the protocol; DeepSpeed is imported with the adapter, when an engine starts."""
    code = "import sys, megapromoe.engine.engine, megapromoe.checkpoint.manager; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("version", ["0.19.7", "0.18.9", "0.20.0", "0.20.0.dev1", "1.0"])
def test_other_versions_of_deepspeed_are_refused(version):
    with pytest.raises(EngineError, match=f"DeepSpeed {version} is installed.*pip install 'deepspeed>=0.19.8,<0.20'"):
        internals.check_version(version)


def test_supported_versions_of_deepspeed_are_accepted():
    for version in ("0.19.8", "0.19.8+cu130", "0.19.12"):
        internals.check_version(version)


def start_with_version(version: str) -> None:
    """An engine in a process in which DeepSpeed claims to be another version."""
    import deepspeed

    deepspeed.__version__ = version
    for name in [name for name in sys.modules if name.startswith("megapromoe.engine.deepspeed_backend.")]:
        del sys.modules[name]
    engine_of()


def test_the_version_is_checked_at_start_up():
    with pytest.raises(AssertionError, match="EngineError: DeepSpeed 0.20.1 is installed"):
        run(1, start_with_version, "0.20.1")


def without(internal: str, file: str) -> list[str]:
    """What the adapter misses in a DeepSpeed without one of its internals ("": with all of them)."""
    started = start.deepspeed.initialize

    def initialize(*arguments, **named):
        engine, *others = started(*arguments, **named)
        if internal:
            owner = engine.optimizer if internal in vars(engine.optimizer) else type(engine.optimizer)
            delattr(owner, internal)
        return engine, *others

    start.deepspeed.initialize = initialize
    engine, _ = engine_of(f"train.deepspeed={file}")
    return engine._backend.missing_internals()


@pytest.mark.parametrize("file", [*(f"fp32_zero{zero}" for zero in range(4)), "bf16_zero2_offload"])
def test_deepspeed_has_the_internals_that_the_adapter_relies_on(file):
    (missing,) = run(1, without, "", file)
    assert not missing, f"this DeepSpeed lacks {missing}: adapt megapromoe/engine/deepspeed_backend/"


@pytest.mark.parametrize("internal, zero", [("scaled_global_norm", 1), ("partition_size", 2), ("fp16_groups", 3)])
def test_a_missing_internal_is_named(internal, zero):
    with pytest.raises(AssertionError, match=rf"EngineError: DeepSpeed \S+ lacks \w+\.{internal}, on which"):
        run(1, without, internal, f"fp32_zero{zero}")


def test_the_list_of_internals_is_complete():
    """Every attribute that the adapter uses of ZeRO's optimizers and of their parameters is in its list."""
    files = list(Path(internals.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    uses = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    listed = {name for names in internals.INTERNALS.values() for name in names}
    assert {n.attr for n in uses if n.value.id == "zero"} == listed
    used = {n.attr for n in uses if n.value.id == "p"}
    public = {"data", "numel", "offset", "start", "stop"}  # of parameters and of our pieces
    assert used - public == set(internals.PARAMETER_INTERNALS)
    tables = {n.attr for n in uses if n.value.id == "deepspeed_groups"}
    assert tables <= set(internals.GROUP_TABLES)
