"""A diffusion transformer from a preset, in a loop of one's own; no engine, no run directory.

python examples/model_from_preset.py
"""

import torch

from megapromoe.config.resolve import resolve
from megapromoe.diffusion.objectives import make_objective
from megapromoe.nn import DiT


def main() -> None:
    config = resolve("digits", overrides=["model.depth=2", "model.hidden_size=64"])
    torch.manual_seed(0)
    model = DiT(config.model).train()
    objective = make_objective(config)

    labels = torch.tensor([3, 1, 4, config.model.null_class])  # images without a class come last
    clean, noise, u = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.rand(4)
    noisy, time = objective.corrupt(clean, noise, u)
    prediction, auxiliary = model(noisy, time, labels, num_conditional=3)
    loss = objective.loss(prediction, clean, noise, u) + auxiliary.total()
    loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, loss {float(loss.detach()):.3f}, losses {sorted(auxiliary.losses)}")


if __name__ == "__main__":
    main()
