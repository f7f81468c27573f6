"""The loss of a trained model on fixed samples, the same for every model: less noisy than the training loss.

model, config, step = load_model(Path("runs/digits"))
dataset, split = open_held_out(config)
mean, error = objective_loss(model, config, dataset)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.diffusion.noise import normals, permutation
from megapromoe.diffusion.objectives import make_objective
from megapromoe.nn.text_condition import TextCondition


def open_held_out(config: Config) -> tuple[Dataset, str]:
    """Opens the data to evaluate on, and returns the name of its split: "test" if the source has one, else "train".

    On "train" the model was trained on the records, but not with the same noise and times. Raises DatasetError.
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
    """Mean loss over fixed samples of (record, noise, time), conditioned on labels or captions, and its standard error.

    Records are used in a fixed random order and equally often, up to one. Records that are distributions, such as
    latents, are replaced by their mean. Times are stratified over the training distribution: quantile (n + 1/2) /
    draws, in random order. Everything depends on (seed, n) only, so two models get the same samples, and the difference
    of their losses is much more precise than each loss. The standard error assumes independent samples, so it is an
    upper estimate. If the output of a model depends on its batch, like that of DiffMoE, the loss also depends on
    `sample.batch`.

    Args:
        model: unsharded, in eval mode.
        config: config of the run.
        dataset: records and labels; with `model.condition=text`, records with captions.
        draws: number of samples.
        seed: seed of the samples; independent of training samples with the same seed.
        progress: called after each batch with its number of samples.

    Returns:
        mean loss and standard error.

    Raises ValueError unless `draws` is at least 2; FloatingPointError if a loss is not finite; DatasetError if captions
    cannot be read.
    """
    if draws < 2:
        raise ValueError(f"draws = {draws}: must be at least 2, or there is no standard error")
    objective, device = make_objective(config), next(model.parameters()).device
    captions = open_captions(config, dataset)
    record_N = permutation(seed, "held-out record", 0, len(dataset))[np.arange(draws) % len(dataset)]
    u_N = ((permutation(seed, "held-out time", 0, draws) + 0.5) / draws).astype(np.float32)
    losses = []
    for first in range(0, draws, config.sample.batch):
        n_B = np.arange(first, min(first + config.sample.batch, draws))
        records_BCHW = dataset.sample(record_N[n_B], np.zeros(len(n_B), dtype=bool), None)
        clean_BCHW = torch.from_numpy(np.ascontiguousarray(records_BCHW)).to(device)
        noise_BCHW = torch.from_numpy(normals(seed, "held-out noise", n_B, dataset.shape)).to(device)
        u_B = torch.from_numpy(u_N[n_B]).to(device)
        condition: Tensor | TextCondition
        if captions is None:
            condition = torch.from_numpy(np.asarray(dataset.labels)[record_N[n_B]]).long().to(device)
        else:
            texts = captions.batch(record_N[n_B], np.zeros(len(n_B), dtype=bool))
            condition = TextCondition(texts.features_BND, texts.mask_BN).to(device)
        x_BCHW, t_B = objective.corrupt(clean_BCHW, noise_BCHW, u_B)
        prediction, _ = model(x_BCHW, t_B, condition, len(n_B))
        losses.append(objective.losses_B(prediction, clean_BCHW, noise_BCHW, u_B).double().cpu())
        progress(len(n_B))
    loss_N = torch.cat(losses)
    if not loss_N.isfinite().all():
        raise FloatingPointError(f"{int((~loss_N.isfinite()).sum())} of {draws} held-out losses are not finite")
    return float(loss_N.mean()), float(loss_N.std() / math.sqrt(draws))
