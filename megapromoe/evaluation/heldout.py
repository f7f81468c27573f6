"""The loss of a trained model on draws that are the same for every model: what training's own loss is too noisy for.

model, config, step = load_model(Path("runs/digits"))
dataset, split = open_held_out(config)
mean, error = objective_loss(model, config, dataset)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.noise import normals, permutation
from megapromoe.diffusion.objectives import make_objective


def open_held_out(config: Config) -> tuple[Dataset, str]:
    """What to evaluate on, and the name of its split: "test" where the source has one, else "train".

    On "train" the records were trained on, though neither the noise nor the times. Raises DatasetError.
    """
    data = config.data
    has_test = data.source == "fashion_mnist" or (data.source == "latents" and data.test_path)
    split = "test" if has_test else "train"
    return open_dataset(config, split), split


@torch.no_grad()
def objective_loss(
    model: nn.Module,
    config: Config,
    dataset: Dataset,
    draws: int = 4096,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[float, float]:
    """Mean loss over fixed draws of (record, noise, time), each under its label, and its standard error.

    Records come in turn, in an order of their own, so that each is drawn as often as any other, give or take one; those
    that are distributions, such as latents, are taken at their mean. Times are spread evenly over the training's
    distribution: quantile (n + 1/2) / draws, shuffled against the records. All depends on (seed, n) alone: two models
    see the same draws, so their difference is known far better than either loss. The standard error is that of
    independent draws, hence rather too large. Where a model's output depends on its batch, as DiffMoE's does, the loss
    also depends on `sample.batch`.

    Args:
        model: whole, in eval mode.
        draws: number of draws.
        seed: of the draws; they share nothing with the training's of the same seed.
        progress: called after each batch with its draws.

    Raises ValueError unless `draws` is at least 2; FloatingPointError if a loss is not finite.
    """
    if draws < 2:
        raise ValueError(f"draws = {draws}: must be at least 2, or there is no standard error")
    objective, device = make_objective(config), next(model.parameters()).device
    record_N = permutation(seed, "held-out record", 0, len(dataset))[np.arange(draws) % len(dataset)]
    u_N = ((permutation(seed, "held-out time", 0, draws) + 0.5) / draws).astype(np.float32)
    losses = []
    for first in range(0, draws, config.sample.batch):
        n_B = np.arange(first, min(first + config.sample.batch, draws))
        records_BCHW = dataset.sample(record_N[n_B], np.zeros(len(n_B), dtype=bool), None)
        clean_BCHW = torch.from_numpy(np.ascontiguousarray(records_BCHW)).to(device)
        noise_BCHW = torch.from_numpy(normals(seed, "held-out noise", n_B, dataset.shape)).to(device)
        u_B = torch.from_numpy(u_N[n_B]).to(device)
        labels_B = torch.from_numpy(np.asarray(dataset.labels)[record_N[n_B]]).long().to(device)
        x_BCHW, t_B = objective.corrupt(clean_BCHW, noise_BCHW, u_B)
        prediction, _ = model(x_BCHW, t_B, labels_B, len(n_B))
        losses.append(objective.losses_B(prediction, clean_BCHW, noise_BCHW, u_B).double().cpu())
        progress(len(n_B))
    loss_N = torch.cat(losses)
    if not loss_N.isfinite().all():
        raise FloatingPointError(f"{int((~loss_N.isfinite()).sum())} of {draws} held-out losses are not finite")
    return float(loss_N.mean()), float(loss_N.std() / math.sqrt(draws))
