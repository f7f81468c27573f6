"""The benchmark: contenders have equal results, loads and messages are as planned, and paired statistics."""

import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from support.backends import benchmarks_without_inductor
from support.processes import run
from torch._dynamo.utils import counters
from torch.nn import functional as F

from megapromoe.benchmark import baselines, layer, measure, models, routing_patterns, suite, traffic
from megapromoe.benchmark.baseline_wrapper import CannotRun
from megapromoe.benchmark.baselines import CONTENDERS, BatchedCapacity, make_contender
from megapromoe.benchmark.layer import BenchmarkError, Settings, first_layer
from megapromoe.benchmark.timed_case import TimedCase
from megapromoe.benchmark.updates import make_update
from megapromoe.distributed import mesh
from megapromoe.nn import MoE
from megapromoe.nn.moe.auxiliary import auxiliary_losses

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, threads=1, rounds=2, images=4, contenders=("ours", "loop", "dense"), null=0.25)
DIGITS = suite.config_of("digits")


def settings(**changes) -> Settings:
    return replace(SETTINGS, **changes)


def outcome(module, x_BSD, conditional: int) -> dict:
    """Output, and gradients of the tokens and of every parameter, with all losses."""
    x_BSD = x_BSD.detach().clone().requires_grad_()
    case = TimedCase(module, x_BSD, torch.linspace(-1, 1, x_BSD.numel()).view_as(x_BSD), conditional)
    case.prepare()
    case.forward()
    case.backward()
    tensors = {"output": case.outputs[0].detach(), "x": x_BSD.grad}
    for name, p in module.named_parameters():
        tensors[name.removeprefix("moe.")] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return tensors


# ---- contenders


@pytest.mark.parametrize("null", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("routing", routing_patterns.ROUTINGS)
@pytest.mark.parametrize("name", ["loop", "joined", "bmm"])
def test_contenders_are_ours(name, routing, null):
    some = settings(null=null)
    moe, x_BSD = first_layer(DIGITS, routing, some)
    other = (
        BatchedCapacity(moe, capacity_factor=4.0) if name == "bmm" else make_contender(name, moe)
    )  # 4: slots for all rows
    expected, actual = (outcome(module.train(), x_BSD, some.num_conditional) for module in (moe, other))
    assert expected.keys() == actual.keys() and expected["x"].any()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert null == 1.0 or expected["experts.fc1.weight"].any()


def test_the_loop_is_ours_with_two_experts_a_token():
    config = suite.config_of("digits")
    config = replace(config, model=replace(config.model, top_k=2))
    moe, x_BSD = first_layer(config, "real", SETTINGS)
    expected, actual = (outcome(m.train(), x_BSD, 3) for m in (moe, make_contender("loop", moe)))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)


def test_batched_capacity_drops_rows_without_a_slot():
    moe, x_BSD = first_layer(DIGITS, "skewed", settings(null=0.0))
    other = make_contender("bmm", moe)
    case = TimedCase(other, x_BSD, torch.ones_like(x_BSD), 4)
    case.run_untimed()
    load = routing_patterns.planned_counts("skewed", 64, 4)
    assert case.dropped == pytest.approx(1 - sum(min(rows, 20) for rows in load) / 64)  # 20 = 1.25 · 64 / 4
    assert case.dropped > 0.1


def deepspeed(drops: bool) -> tuple:
    """Output of DeepSpeed's layer, its formula, and the share of rows that it dropped, counted in two ways."""
    moe, x_BSD = first_layer(DIGITS, "skewed", SETTINGS)
    other = make_contender("deepspeed-capacity" if drops else "deepspeed-nodrop", moe).train()
    y_BSD, auxiliary = other(x_BSD, 3)
    y_TD = y_BSD.flatten(0, 1)
    x_TD, n = x_BSD.flatten(0, 1), 3 * 16
    unit_ED = F.normalize(moe.router.prototypes.float(), dim=-1)
    p_TE = (x_TD[:n] @ unit_ED.T).softmax(-1)
    fc1, fc2, rows = moe.experts.fc1, moe.experts.fc2, []
    for x, p_E in zip(x_TD[:n], p_TE, strict=True):
        e = int(p_E.argmax())
        hidden = F.gelu(fc1.weight[e] @ x + fc1.bias[e], approximate="tanh")
        rows.append(p_E[e] * (fc2.weight[e] @ hidden + fc2.bias[e]))
    expected = moe.shared(x_TD) + torch.cat([torch.stack(rows), moe.unconditional(x_TD[n:])])
    without_expert = (y_TD[:n] - moe.shared(x_TD)[:n]).abs().amax(1) < 1e-6
    (loss,) = auxiliary_losses([auxiliary]).values()
    (y_TD.sum() + loss).backward()
    share = float(without_expert.float().mean())
    return y_TD.detach(), expected.detach(), float(auxiliary.dropped), share, float(loss), auxiliary.load_E


def test_deepspeed_is_its_formula():
    ((y, expected, dropped, without_expert, loss, load_E),) = run(1, deepspeed, False)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert dropped == without_expert == 0 and loss > 0
    assert load_E.tolist() == routing_patterns.planned_counts("skewed", 48, 4)


def test_deepspeed_drops_rows_without_a_slot():
    ((y, expected, dropped, without_expert, _, _),) = run(1, deepspeed, True)
    assert dropped == pytest.approx(without_expert) and dropped > 0.1
    assert not torch.allclose(y, expected, atol=1e-3)


def whole_models() -> list[dict]:
    """DeepSpeed's layers in a step and in sampling."""
    wanted = settings(contenders=("dense", "deepspeed-capacity", "deepspeed-nodrop"), rounds=1)
    return [measure(DIGITS, "real", wanted) for measure in (models.measure_step, models.measure_sample)]


def test_deepspeed_layers_in_complete_models():
    ((step, sampling),) = run(1, whole_models)
    for figures in (step["contenders"], sampling["contenders"]):
        assert all(f["ratio"]["median"] > 0 and f["counts"]["total"]["kernels"] for f in figures.values()), figures
        assert figures["deepspeed-nodrop"]["dropped"] == 0


@pytest.mark.parametrize("number", ["num_shared_experts", "num_unconditional_experts"])
def test_baselines_have_one_shared_and_one_unconditional_expert(number):
    moe, x_BSD = first_layer(replace(DIGITS, model=replace(DIGITS.model, **{number: 2})), "real", SETTINGS)
    with pytest.raises(CannotRun, match="model.num_shared_experts=1 and model.num_unconditional_experts=1"):
        outcome(make_contender("loop", moe).train(), x_BSD, 3)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in ("ours", "dense")])
def test_baselines_compute_no_swiglu(name):
    moe, x_BSD = first_layer(replace(DIGITS, model=replace(DIGITS.model, activation="swiglu")), "real", SETTINGS)
    with pytest.raises(CannotRun, match="model.activation = 'swiglu': needs model.activation=gelu"):
        make_contender(name, moe)
    for kind in ("ours", "dense"):
        assert all(t.isfinite().all() for t in outcome(make_contender(kind, moe).train(), x_BSD, 3).values())


def test_a_deepspeed_layer_without_a_job_cannot_run():
    moe, _ = first_layer(DIGITS, "real", SETTINGS)
    with pytest.raises(CannotRun, match="needs a torch.distributed job"):
        make_contender("deepspeed-nodrop", moe)


def test_equal_products_of_dense_and_experts():
    """By the cost table and by counting. The router and the contrastive loss with its sums of tokens are extra."""
    figures = layer.measure_layer(DIGITS, "skewed", settings(contenders=("ours", "dense", "bmm")))["contenders"]
    m = DIGITS.model
    router = 3 * 2 * m.tokens * m.hidden_size * m.num_experts  # of one image, forward and backward
    contrast = 3 * 2 * m.num_experts**2 * m.hidden_size
    sums = 2 * 3 * m.tokens * m.hidden_size * m.num_experts  # of the images with a class
    ours, dense = figures["ours"], figures["dense"]
    products = ours["counts"]["total"]["flops"]
    assert dense["counts"]["total"]["flops"] == dense["flops"]["useful"]
    assert products == ours["flops"]["useful"] - router + contrast + sums  # one null image
    assert ours["flops"]["useful"] - 4 * router == dense["flops"]["useful"]
    assert figures["bmm"]["counts"]["total"]["flops"] > products  # it multiplies empty slots
    assert dense["memory"]["peak"] == dense["memory"]["necessary"]
    assert (
        ours["counts"]["forward"]["flops"] * 3 == products + 2 * sums
    )  # backward has twice the FLOPs, except of the sums


@pytest.mark.full
def test_kept_memory_is_not_fetched_page_by_page():
    """In another process, because the setting holds for the rest of a process."""
    program = (
        "import resource, torch\n"
        "from megapromoe.benchmark.machine import keep_memory\n"
        "kept, faults = keep_memory(), []\n"
        "for _ in range(24):\n"
        "    torch.ones(16, 2**20)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(kept, faults[-1] - faults[-4])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    assert kept == "False" or int(faults) < 50, result.stdout


@pytest.mark.full
def test_whole_models_are_compiled_alike():
    """With `compile` the model of each contender is compiled before it is measured."""
    before = counters["stats"]["unique_graphs"]
    with (
        benchmarks_without_inductor(),
        patch.object(models, "compile_model", side_effect=models.compile_model) as compile_model,
    ):
        figures = models.measure_step(DIGITS, "real", settings(compile=True, rounds=1))["contenders"]
    compiled = [type(call.args[0].blocks[1].mlp).__name__ for call in compile_model.call_args_list]
    assert compiled == ["MoE", "Loop", "Mlp"]
    assert all(f["counts"]["total"]["kernels"] > 300 for f in figures.values())  # counted in eager mode
    assert counters["stats"]["unique_graphs"] - before >= 5  # each model's embedding, attention, residual, ...


# ---- routing patterns


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 12, 256])
def test_planned_counts_sum_to_all_tokens(experts):
    for kind in ("balanced", "skewed"):
        load = routing_patterns.planned_counts(kind, 1000, experts)
        assert sum(load) == 1000 and len(load) == experts and min(load) >= 0
        assert torch.bincount(routing_patterns.planned_experts(kind, 1000, experts), minlength=experts).tolist() == load
    balanced, skewed = (
        routing_patterns.planned_counts("balanced", 1000, experts),
        routing_patterns.planned_counts("skewed", 1000, experts),
    )
    assert max(balanced) - min(balanced) <= 1
    if experts > 2:
        assert skewed[0] >= 500 and skewed[-1] == 0 and skewed == sorted(skewed, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biased_tokens_go_to_their_expert(dtype):
    config = suite.config_of("digits", 64)  # as many as channels
    moe, x_BSD = first_layer(config, "skewed", settings(dtype=dtype, images=64))
    load = layer.check_load(moe, x_BSD, "skewed", 48)
    assert load == routing_patterns.planned_counts("skewed", 48 * 16, 64)


def test_no_bias_separates_parallel_prototypes():
    with pytest.raises(ValueError, match="prototypes are parallel"):
        routing_patterns.bias_tokens_towards(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]), torch.ones(2, 8))


def test_a_routing_that_is_not_the_planned_is_refused(monkeypatch):
    monkeypatch.setattr(layer, "bias_tokens_towards", lambda x_TD, *_: x_TD)
    with pytest.raises(BenchmarkError, match="balanced routing: experts got"):
        layer.measure_layer(DIGITS, "balanced", SETTINGS)
    monkeypatch.setattr(models.PlannedChoice, "__call__", lambda self, score: score.argmax(-1, keepdim=True))
    with pytest.raises(BenchmarkError, match="skewed routing: experts got"):
        models.measure_step(DIGITS, "skewed", SETTINGS)


@pytest.mark.full
def test_every_compiled_case_starts_without_compiled_code(monkeypatch):
    """torch limits how often a process compiles a function, and a run of the benchmark has many cases."""
    calls = []
    make_update = models.make_update
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(models, "compile_model", lambda model: calls.append("compile"))
    monkeypatch.setattr(models, "make_update", lambda model, train, compiled: make_update(model, train, False))
    settings = replace(SETTINGS, rounds=1, contenders=("ours", "dense"))
    for compiled in (True, True, False):
        models.measure_step(DIGITS, "real", replace(settings, compile=compiled))
    assert calls == ["reset", "compile", "compile"] * 2


def test_a_planned_choice_is_part_of_a_graph_for_any_number_of_images():
    torch._dynamo.reset()
    choice = models.PlannedChoice(MoE(hidden_size=8, num_experts=4).router, "skewed")
    compiled = torch.compile(choice.__call__, backend="aot_eager", fullgraph=True)
    for images in (3, 1, 5):
        score_BSE = torch.rand(images, 16, 4)
        expected = choice(score_BSE)
        assert expected.flatten().bincount(minlength=4).tolist() == routing_patterns.planned_counts(
            "skewed", images * 16, 4
        )
        torch._dynamo.decorators.mark_unbacked(score_BSE, 0)
        assert torch.equal(compiled(score_BSE), expected)


# ---- paired statistics


class FakeClock:
    """Returns the seconds that the running contender has set."""

    def __init__(self):
        self.seconds = 0.0

    def time(self, phases):
        seconds = {}
        for name, work in phases.items():
            work()
            seconds[name] = self.seconds
        return seconds


def test_contenders_run_interleaved():
    clock, order = FakeClock(), []

    def work(name, seconds):
        def go():
            order.append(name)
            clock.seconds = seconds * (1 + len(order) // 3)  # the machine gets slower from round to round

        return measure.Work({"forward": go, "backward": lambda: None}, lambda: order.append(f"prepare {name}"))

    works = {"a": work("a", 1.0), "b": work("b", 2.0), "c": work("c", 4.0)}
    samples = measure.interleave(works, rounds=20, clock=clock, warmup=2, seed=1)
    assert all(len(values) == 20 for phases in samples.values() for values in phases.values())
    rounds = [tuple(order[i + 1 : i + 6 : 2]) for i in range(0, len(order), 6)]
    assert len(rounds) == 22 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3, "the order is the same in each round"
    assert order[0::2] == [f"prepare {name}" for name in order[1::2]]
    assert measure.interleave(works, 1, clock).keys() == works.keys()
    with pytest.raises(ValueError, match="rounds: 0"):
        measure.interleave(works, 0, clock)


def test_ratios_are_paired():
    slow = [1.0, 10.0, 2.0, 40.0, 3.0]  # a machine of varying speed
    ratio = measure.paired_ratio([1.5 * s for s in slow], slow)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    noisy = measure.paired_ratio([1.0, 1.2, 1.4, 1.6, 1.8], [1.0] * 5)
    assert noisy.median == pytest.approx(1.4) and noisy.low < 1.4 < noisy.high
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == measure.Spread(3.0, 2.0, 4.0)
    samples = {"dense": {"forward": [1.0, 2.0], "backward": [1.0, 2.0]}, "ours": {"forward": [3.0, 6.0]}}
    assert measure.summary(samples, "dense")["ours"]["ratio"]["median"] == 1.5
    assert "ratio" not in measure.summary(samples, "loop")["ours"]


def test_the_rest_of_ours_is_dispatch_and_combine():
    parts = {f"part {n}": {"forward": [1.0, 2.0], "backward": [1.0, 1.0]} for n in ("router", "experts")}
    summary = layer.parts_summary({"ours": {"forward": [5.0, 6.0], "backward": [2.0, 3.0]}, **parts})
    assert summary["dispatch and combine"]["forward"]["median"] == 2.5
    assert summary["dispatch and combine"]["backward"]["median"] == 0.5


# ---- models


def test_models_share_parameters_and_agree():
    """A step of ours and of the loop, from the same weights, ends at the same weights; dense has weights of its own."""
    ours = models.build(DIGITS, mesh.UNSHARDED)
    other = models._model("loop", ours, DIGITS, "real")
    assert {id(p) for p in ours.parameters()} == {id(p) for p in other.parameters()}
    assert any(isinstance(m, baselines.Loop) for m in other.modules())
    assert not any(isinstance(m, baselines.Loop) for m in ours.modules())
    batch = models.Batch(DIGITS, SETTINGS)
    gradients = []
    for model in (ours, other):
        model.zero_grad()
        batch.loss(model.train()).backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    dense = models._model("dense", ours, DIGITS, "real")
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in dense.parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_update_keeps_fp32_masters(compiled):
    model = torch.nn.Linear(4, 4).bfloat16()
    start = model.weight.detach().float().clone()
    t = replace(DIGITS.train, lr=1e-5, max_grad_norm=0.0)
    update = make_update(model, t, compiled)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            update.step()
    assert torch.allclose(update.masters[0], start - 3e-5, atol=2e-6)  # too little for bf16 to see step by step
    assert torch.equal(model.weight, update.masters[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_updates_are_the_same_function(dtype):
    """Clipped and not clipped, with a parameter whose length is no multiple of the alignment."""
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 7)).to(dtype)
        update = make_update(model, replace(DIGITS.train, lr=1e-2, weight_decay=0.1), compiled)
        with torch.compiler.set_stance("force_eager"):
            for scale in (100.0, 1e-3, 1.0):
                for p in model.parameters():
                    p.grad = scale * torch.randn_like(p)
                update.step()
        weights.append([master.detach() for master in update.masters])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- messages


def messages(name: str, routing: str) -> dict:
    return traffic.count_messages(name, DIGITS, routing, SETTINGS)


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_our_messages_are_the_bound(routing):
    counts = traffic.merge_ranks(run(2, messages, "ours", routing))
    count_bytes = 2 * 2 * 8  # each rank sends the row counts of 2 experts to the other, int64
    assert counts["forward"]["collectives"] == {"alltoall_base_": 3}
    assert counts["backward"]["collectives"]["alltoall_base_"] == 2
    assert counts["forward"]["sent"]["alltoall_base_"] == counts["forward"]["bound"] + count_bytes
    assert counts["backward"]["sent"]["alltoall_base_"] == counts["backward"]["bound"] > 0


def test_deepspeed_sends_empty_slots_too():
    counts = traffic.merge_ranks(run(2, messages, "deepspeed-nodrop", "skewed"))
    assert counts["forward"]["sent"]["alltoall_base_"] > 1.5 * counts["forward"]["bound"]
