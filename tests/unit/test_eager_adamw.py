"""AdamW without torch's compiler: the numbers of torch's, and its two tensors that decide a step on the device."""

import pytest
import torch

from megapromoe.engine.eager_adamw import EagerAdamW

SETTINGS = {"fused": True, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("scale, skipped", [(None, None), (0.25, (False, False, False)), (2.0, (False, True, False))])
def test_it_computes_what_that_of_torch_computes(scale, skipped):
    """Two groups, the second added later; gradients divided by a scale; updates skipped by a flag."""
    initial = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 7)]
    results = []
    for kind in (EagerAdamW, torch.optim.AdamW):
        weights = [torch.nn.Parameter(value.clone()) for value in initial]
        optimizer = kind(weights[:1], **SETTINGS)
        optimizer.add_param_group({"params": weights[1:], "weight_decay": 0.0})
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": weights[1:]})
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            if scale is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(skipped[step]))
            for number, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, 0.1 * (step + 1)) + number * weight.detach()
            optimizer.step()
        assert all(weight.requires_grad and weight.is_leaf for weight in weights)
        results.append((weights, [optimizer.state[weight] for weight in weights]))
    (ours, our_states), (theirs, their_states) = results
    for weight, expected, start in zip(ours, theirs, initial, strict=True):
        assert torch.equal(weight, expected) and not torch.equal(weight, start)
    for state, expected in zip(our_states, their_states, strict=True):
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_hooks_of_a_step_are_called():
    """Profilers and others add them to a torch optimizer."""
    weight, calls = torch.nn.Parameter(torch.ones(2)), []
    optimizer = EagerAdamW([weight], **SETTINGS)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["before", "after"]
