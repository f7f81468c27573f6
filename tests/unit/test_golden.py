"""The models agree with the published implementations: outputs, every loss, every gradient, a short training run."""

import pytest
import torch
from support.fidelity import LIMIT, ZERO_LIMIT, compare, parts, relative
from support.golden_cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_gradients(case, fidelity):
    """Each tensor is compared separately: also each expert, and queries, keys and values of attention."""
    comparison = fidelity["cases"][case] = compare(case)
    assert not comparison.unexpected
    assert {"positions", "eval", "train"} == comparison.outputs.keys() and "mse" in comparison.losses
    for kind in (comparison.outputs, comparison.losses, comparison.gradients):
        assert kind and not {name: value for name, value in kind.items() if not value <= LIMIT}
    # An attention key's bias of each block, which adds the same to all scores of a query.
    assert len(comparison.zeros) == 4 and max(comparison.zeros.values()) <= ZERO_LIMIT
    if case != "dense":
        for layer in (1, 3):
            for expert in range(4):
                assert f"blocks.{layer}.mlp.experts.fc1.weight[{expert}]" in comparison.gradients


def test_an_error_in_one_small_expert_is_not_hidden_by_the_others():
    published = torch.ones(4, 3, 2) * torch.tensor([1.0, 1.0, 1.0, 1e-4])[:, None, None]
    ours = published.clone()
    ours[3] *= 1.001
    assert relative(ours, published) < LIMIT
    name = "blocks.1.mlp.experts.fc1.weight"
    deviations = [relative(a, b) for (_, a), (_, b) in zip(parts(name, ours), parts(name, published), strict=True)]
    assert deviations[:3] == [0, 0, 0] and deviations[3] == pytest.approx(1e-3, rel=1e-3)
    qkv = torch.cat([torch.ones(2, 2), 1e-4 * torch.ones(2, 2), torch.ones(2, 2)])
    assert [part for part, _ in parts("blocks.0.attn.qkv.weight", qkv)] == [
        f"blocks.0.attn.qkv.weight[{which}]" for which in "qkv"
    ]
    assert relative(torch.ones(2), torch.zeros(2)) == float("inf") and relative(torch.zeros(2), torch.zeros(2)) == 0
