"""Assignments, experts, and the plain loop over rows with which tests compare dispatchers."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.dispatcher import Dispatcher
from megapromoe.nn.moe.layer import Experts

T, D, F, E = 24, 16, 32, 6


def experts_of(seed: int) -> Experts:
    bank = Experts(E, D, F)
    generator = torch.Generator().manual_seed(seed)
    for p in bank.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return bank


def plain(x_TD, assignment: TokenAssignment, bank: Experts):
    """Row by row, by the formula: Σ weight · W2·gelu(W1·x + b1) + b2."""
    rows = [torch.zeros(D) for _ in range(x_TD.shape[0])]
    token_R, expert_R, weight_R = assignment[:3]
    for token, expert, weight in zip(token_R.tolist(), expert_R.tolist(), weight_R, strict=True):
        hidden = bank.fc1.weight[expert] @ x_TD[token] + bank.fc1.bias[expert]
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        rows[token] = rows[token] + weight * (bank.fc2.weight[expert] @ hidden + bank.fc2.bias[expert])
    return torch.stack(rows) if rows else x_TD.new_zeros(0, D)


def assignment_of(kind: str, tokens: int, seed: int) -> TokenAssignment:
    g = torch.Generator().manual_seed(seed)
    if kind == "empty":
        return TokenAssignment(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), 0)
    if kind == "any rows":  # tokens without a row, tokens with several
        token_R = torch.randint(tokens, (31,), generator=g)
        return TokenAssignment(token_R, torch.randint(E, (31,), generator=g), torch.rand(31, generator=g), 0)
    K = 2 if kind == "top 2" else 1
    expert_TK = torch.rand(tokens, E, generator=g).topk(K, dim=1).indices
    if kind == "one expert":
        expert_TK = torch.full((tokens, 1), 4)
    weight = torch.rand(tokens * K, generator=g)
    return TokenAssignment(torch.arange(tokens).repeat_interleave(K), expert_TK.flatten(), weight, K)


def outcome(function, x, assignment: TokenAssignment, bank: Experts):
    """Output, and gradients of x, of the weights and of every parameter, for one fixed loss."""
    x = x.clone().requires_grad_()
    weight_R = assignment.weight_R.clone().requires_grad_()
    bank.zero_grad()
    y = function(x, assignment._replace(weight_R=weight_R), bank)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None and weight_R.grad is not None, "the graph was cut"
    return [y.detach(), x.grad, weight_R.grad, *(p.grad for p in bank.parameters())]


def onto_zeros(dispatcher: Dispatcher):
    def outputs(x, assignment, bank):
        dispatched = dispatcher.dispatch(x, assignment, len(x))
        return dispatcher.combine(dispatcher.run_experts(dispatched, bank), torch.zeros_like(x))

    return outputs


@contextmanager
def recorded_messages(events: list[str]) -> Iterator[None]:
    """Within it all-to-alls append "counts" or "rows" to the events, and asynchronous ones "wait" when they end."""
    real = dist.all_to_all_single

    class RecordedWait:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def recorded(out, x, *arguments, async_op=False, **options):
        events.append("rows" if x.is_floating_point() else "counts")
        work = real(out, x, *arguments, async_op=async_op, **options)
        return RecordedWait(work) if async_op else work

    with patch.object(dist, "all_to_all_single", recorded):
        yield


KINDS = ("top 1", "top 2", "one expert", "any rows", "empty")


# Assignments of the ranks of a group, one for each rank.
MIXED = [
    ("top 1", "top 1"),
    ("top 2", "one expert"),
    ("one expert", "one expert"),
    ("empty", "any rows"),
    ("empty", "empty"),
    ("top 1", "one expert", "empty", "top 2"),
]
