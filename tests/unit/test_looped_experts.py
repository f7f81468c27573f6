"""Looped experts: both layers of an expert at once compute what two calls compute, bit by bit."""

import pytest
import torch
from support.dispatch_cases import D, E, F, experts_of
from torch.utils._python_dispatch import TorchDispatchMode

from megapromoe.nn.moe.expert_linear import ExpertLinear, ExpertOffsets

ROWS = {"every expert": [5, 1, 7, 3, 9, 2], "some without rows": [0, 9, 0, 0, 4, 0], "no rows": [0] * E}


def offsets_of(rows):
    ends = torch.tensor(rows).cumsum(0)
    return ExpertOffsets(torch.repeat_interleave(torch.arange(E), torch.tensor(rows)), ends.int(), ends.tolist())


def outcome(experts, rows, dtype, output):
    """The output, and the gradients of the rows and of all parameters."""
    x = torch.randn(sum(rows), D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    experts.zero_grad(set_to_none=True)
    y = output(x, offsets_of(rows))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in experts.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_one_function_computes_the_bits_of_two_layers(rows, dtype):
    experts = experts_of(2).to(dtype)
    at_once = outcome(experts, rows, dtype, experts)
    in_turn = outcome(experts, rows, dtype, lambda x, offsets: experts.fc2(experts.fc1(x, offsets), offsets))
    for a, b in zip(at_once, in_turn, strict=True):
        assert torch.equal(a, b)
    for name, p in experts.named_parameters():
        assert p.grad is not None and not p.grad[[n == 0 for n in rows]].any(), name


@pytest.mark.full
def test_gradients_of_both_layers_are_exact():
    experts = experts_of(3).double()
    x = torch.randn(13, D, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of(ROWS["some without rows"])
    assert torch.autograd.gradcheck(lambda x, *_: experts(x, offsets), (x, *experts.parameters()))


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_an_expert_without_rows_costs_no_product():
    experts = experts_of(4)
    with Operators() as operators:
        outcome(experts, ROWS["some without rows"], torch.float32, experts)
    counts = {name: operators.names.count(name) for name in ("addmm", "mm", "gelu", "gelu_backward")}
    assert counts == {"addmm": 4, "mm": 8, "gelu": 2, "gelu_backward": 2}  # of the two experts with rows


class Doubled(ExpertLinear):
    """A layer of one's own."""

    def forward(self, x_RD, offsets):
        return 2 * super().forward(x_RD, offsets)


@pytest.mark.parametrize("change", ["hook", "subclass", "forward", "none"])
def test_a_layer_that_does_more_than_its_forward_is_called(change):
    """As with ZeRO-3, which fetches the parameters of a module in a hook."""
    experts, plain = experts_of(5), experts_of(5)
    calls = []
    fc1 = experts.fc1
    if change == "hook":
        fc1.register_forward_pre_hook(lambda *_: calls.append("hook"))
    elif change == "subclass":
        experts.fc1 = Doubled(E, D, F, gelu=True)
        experts.fc1.load_state_dict(fc1.state_dict())
    elif change == "forward":
        fc1.forward = lambda x, offsets: calls.append("forward") or ExpertLinear.forward(fc1, x, offsets)
    rows = ROWS["every expert"]
    ours, expected = (outcome(bank, rows, torch.float32, bank)[0] for bank in (experts, plain))
    assert torch.equal(ours, expected) is (change != "subclass")
    assert calls == ([change] if change in ("hook", "forward") else [])
