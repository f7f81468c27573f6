"""The fused update: torch's AdamW with averages and cast, skipped steps, one kernel, nothing for the host to read."""

import shutil
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from megapromoe.benchmark.lowered import LoweringBackend
from megapromoe.config.resolve import ConfigError, resolve
from megapromoe.engine import fused_update
from megapromoe.engine.fused_update import WIDTH, AdamW, State, compile_functions, fused_adamw_, scalars_of

COUNT = 5 * WIDTH + 7  # with a rest, which is a kernel of its own
CONSTANTS = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
BF16 = torch.bfloat16


def new_state(count: int = COUNT, averages: int = 2, dtype: torch.dtype | None = BF16) -> tuple[State, Tensor]:
    """A partition of random weights and its step count."""
    master = torch.randn(count, generator=torch.Generator().manual_seed(0))
    parameter = None if dtype is None else master.to(dtype)
    moments = torch.zeros(count), torch.zeros(count)
    return State(master, *moments, tuple(master.clone() for _ in range(averages)), parameter), torch.zeros(())


def apply(
    state: State,
    step: Tensor,
    gradient: Tensor,
    lr: float = 1e-2,
    divisor: float = 1.0,
    applied: bool = True,
    decays: tuple[float, ...] = (0.5, 0.999),
    compiled: bool = False,
    constants: AdamW = CONSTANTS,
) -> None:
    was_applied = torch.tensor(applied)
    weights = [(was_applied * torch.tensor(1 - decay)).float() for decay in decays]
    rate = torch.tensor(lr, dtype=torch.float64)
    scalars = scalars_of(step, was_applied, torch.tensor(divisor), rate, constants, compiled)
    fused_adamw_(state, gradient, weights, scalars, constants, compiled)


def gradients(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(COUNT, generator=generator).to(BF16) for _ in range(number)]


def compare_with_torch(compiled: bool) -> None:
    """Six steps with other rates and divisors, the third of which is skipped."""
    for constants in (CONSTANTS, AdamW(0.8, 0.999, 1e-3, 0.0)):
        state, step = new_state()
        expected = nn.Parameter(state.master.clone())
        torchs = torch.optim.AdamW(
            [expected],
            betas=(constants.beta1, constants.beta2),
            eps=constants.eps,
            weight_decay=constants.weight_decay,
            fused=True,
        )
        averages = [average.clone() for average in state.averages]
        for number, gradient in enumerate(gradients(6)):
            lr, divisor, applied = 1e-2 / (1 + number), 1.0 + number, number != 2
            apply(state, step, gradient, lr, divisor, applied, compiled=compiled, constants=constants)
            if applied:
                expected.grad = gradient.float() / divisor
                torchs.param_groups[0]["lr"] = lr
                torchs.step()
                for average, decay in zip(averages, (0.5, 0.999), strict=True):
                    average.lerp_(expected.detach(), 1 - decay)
        moments = torchs.state[expected]
        assert step == moments["step"] == 5
        for ours, theirs in (
            (state.master, expected.detach()),
            (state.moment1, moments["exp_avg"]),
            (state.moment2, moments["exp_avg_sq"]),
            *zip(state.averages, averages, strict=True),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(state.parameter, state.master.to(BF16))


def test_it_is_torchs_adamw():
    compare_with_torch(compiled=False)


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile makes C++ on a CPU, and there is no g++")
def test_compiled_it_is_torchs_adamw():
    compare_with_torch(compiled=True)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_no_bit(value, first):
    """Whatever the gradient is, and also as the first step, for which the bias corrections are 0."""
    state, step = new_state()
    if not first:
        apply(state, step, gradients(1)[0])
    tensors = [state.master, state.moment1, state.moment2, *state.averages, state.parameter, step]
    before = [tensor.clone() for tensor in tensors]
    apply(state, step, torch.full((COUNT,), value, dtype=BF16), divisor=value, applied=False)
    assert all(map(torch.equal, tensors, before))
    apply(state, step, gradients(2)[1])
    assert not any(map(torch.equal, tensors, before)) and all(tensor.isfinite().all() for tensor in tensors)


def test_parts_without_the_compiler_are_the_whole(monkeypatch):
    results = []
    for size in (fused_update.EAGER_PART, 2 * WIDTH):
        monkeypatch.setattr(fused_update, "EAGER_PART", size)
        state, step = new_state()
        apply(state, step, gradients(1)[0])
        results.append(state)
    at_once, parts = results
    assert torch.equal(at_once.master, parts.master) and torch.equal(at_once.parameter, parts.parameter)
    assert all(map(torch.equal, at_once.averages, parts.averages))


def test_the_host_reads_nothing():
    """Tensors without values: reading one raises an error."""
    state, step = new_state()
    on_meta = State(
        *(tensor.to("meta") for tensor in state[:3]),
        tuple(average.to("meta") for average in state.averages),
        state.parameter.to("meta"),
    )
    flag, number = torch.empty((), dtype=torch.bool, device="meta"), torch.empty((), device="meta")
    scalars = scalars_of(step.to("meta"), flag, number, number.double(), CONSTANTS, compiled=False)
    gradient = torch.empty(COUNT, dtype=BF16, device="meta")
    fused_adamw_(on_meta, gradient, [number, number], scalars, CONSTANTS, compiled=False)


@pytest.mark.full
@pytest.mark.parametrize("dtype, minimum", [(BF16, 36), (torch.float32, 38), (None, 34)])
def test_it_is_one_kernel_that_moves_the_minimum(dtype, minimum):
    """Bytes for each parameter: gradient 2, master 8, moments 16, average 8, and the parameter if it is another."""
    backend = LoweringBackend(unknown_size=1)
    functions = compile_functions(backend, dynamic=False)
    count = 100 * WIDTH
    state, step = new_state(count, averages=1, dtype=dtype)
    gradient = torch.randn(count).to(BF16)
    with patch.object(fused_update, "compiled_functions", lambda: functions):
        apply(state, step, gradient, decays=(0.5,), compiled=True)
    scalars, update = backend.graphs
    assert scalars.total == scalars.fused == 1 and scalars.moved < 100
    assert update.total == update.fused == 1 and minimum * count <= update.moved < minimum * count + 100


def test_changing_numbers_and_sizes_do_not_compile_again():
    """One kernel for rows of `WIDTH` elements and one for the rest, for partitions of every size."""
    sizes = []

    def backend(graph, inputs):
        sizes.append([tensor.shape for tensor in inputs if isinstance(tensor, Tensor)])
        return graph.forward

    torch.compiler.reset()
    functions = compile_functions(backend, dynamic=True)
    with patch.object(fused_update, "compiled_functions", lambda: functions):
        compiled = []
        for number, rows in enumerate((5, 9, 200, 31)):
            state, step = new_state(rows * WIDTH + 2 + number)
            for lr, divisor, applied in ((1e-2, 1.0, True), (2e-3, 3.0, False), (0.0, 1.5, True)):
                gradient = torch.randn(state.master.shape).to(BF16)
                apply(state, step, gradient, lr, divisor, applied, compiled=True)
            compiled.append(len(sizes))
    assert len(set(compiled)) == 1, f"compiled again: {compiled}"
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("fp32_zero0", "ZeRO stage 0, which has no flat weights that one pass can update; use stage 1"),
        ("bf16_zero2_offload", "which offloads the optimizer to the host; use train.adamw_backend=torch"),
    ],
)
def test_where_there_are_no_flat_weights_on_the_device_it_is_refused(file, reason):
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=["train.adamw_backend=fused", f"train.deepspeed={file}"])
    assert f"train.adamw_backend = 'fused': is not supported with train.deepspeed = '{file}'" in str(error.value)
    assert reason in str(error.value)
    resolve("digits", overrides=["train.adamw_backend=torch", f"train.deepspeed={file}"])
