"""A short training run of the published code is reproduced by ours, through DeepSpeed's engine."""

import torch
from support.golden_cases import FOLDER
from support.processes import run
from support.published_run import DECAY, assert_reproduced, config, train

from megapromoe.checkpoint.format import KINDS
from megapromoe.conversion.published_names import from_published


def saved_state() -> dict[str, dict[str, torch.Tensor]]:
    """The checkpoint written after three steps, by kind and our logical names."""
    file = torch.load(FOLDER / "published_run.pth", weights_only=True)
    names = list(file["model_state_dict"])
    moments = file["optimizer_state_dict"]["state"]
    by_kind = {"master": file["model_state_dict"], "ema": file["ema_model_state_dict"]}
    for kind in ("exp_avg", "exp_avg_sq"):
        by_kind[kind] = {names[i]: state[kind] for i, state in moments.items()}
    return {kind: from_published(tensors, config().model) for kind, tensors in by_kind.items()}


def initial_weights() -> dict[str, torch.Tensor]:
    """The weights before step 0, which the published files leave out but determine.

    ema_3 = d³·w_0 + (1-d)·(d²·w_1 + d·w_2 + w_3) with d = 0.9999; w_1 and w_2 follow from w_0 by training, and matter
    so little that two rounds settle w_0 to rounding.
    """
    state = saved_state()
    guess = state["ema"]
    zero = {name: torch.zeros_like(w) for name, w in guess.items()}
    for _ in range(3):
        start = {"master": guess, "ema": guess, "exp_avg": zero, "exp_avg_sq": zero}
        w1, w2, _ = train(0, 3, start)["masters"]
        d = DECAY
        guess = {
            name: (
                (ema.double() - (1 - d) * (d**2 * w1[name] + d * w2[name] + state["master"][name].double())) / d**3
            ).float()
            for name, ema in state["ema"].items()
        }
    return guess


def from_the_start() -> dict:
    weights = initial_weights()
    zero = {name: torch.zeros_like(w) for name, w in weights.items()}
    return train(0, 6, dict(zip(KINDS, (weights, zero, zero, weights), strict=True)))


def from_the_checkpoint() -> dict:
    return train(3, 6, saved_state())


def test_steps_0_to_5_from_the_initial_weights():
    assert_reproduced(run(1, from_the_start)[0], 0)


def test_steps_3_to_5_from_the_published_checkpoint():
    assert_reproduced(run(1, from_the_checkpoint)[0], 3)
