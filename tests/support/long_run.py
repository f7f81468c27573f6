"""The long run of the published classes on real digits (golden/README.md), and its steps by ours."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from support.golden_cases import FOLDER, config_of, null_last, parameters_of
from support.published_run import FullTensors
from torch import Tensor

from megapromoe.checkpoint.manager import restore
from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig
from megapromoe.diffusion.objectives import RectifiedFlow
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build

CASE = "long_run"
RECIPE = TrainConfig(lr=1e-3, max_grad_norm=0.5, global_batch=64, deepspeed="fp32_zero1")
NULL_SHARE = 0.1
OBJECTIVE = RectifiedFlow("uniform")  # sigma is given: u itself


def config() -> Config:
    return replace(Config(), model=config_of(CASE).model, train=RECIPE)


class Draws:
    """The batches of the run, from one generator, in the order in which the published run drew them."""

    def __init__(self, seed: int, batch: int):
        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target).long()
        self.generator, self.batch = torch.Generator().manual_seed(seed), batch

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Images (B, 1, 8, 8), noise, sigma (B,), labels with the null class placed last, how many are not null."""
        B, null = self.batch, config().model.null_class
        index_B = torch.randint(len(self.images), (B,), generator=self.generator)
        label_B = self.labels[index_B]
        label_B = torch.where(torch.rand(B, generator=self.generator) < NULL_SHARE, null, label_B)
        order_B, conditional = null_last(label_B, null)
        sigma_B = torch.randn(B, generator=self.generator).sigmoid()
        noise = torch.randn(B, 1, 8, 8, generator=self.generator)
        return self.images[index_B][order_B], noise, sigma_B, label_B[order_B], conditional


def train(steps: int) -> dict:
    """The first steps by ours: losses of each, and after all of them the loss on the fixed draws."""
    mesh = make_mesh()
    engine = Engine(build(config(), mesh), config(), mesh)
    ema = EMA(engine, RECIPE.ema_decays)
    start = parameters_of(CASE)
    zero = {name: torch.zeros_like(value) for name, value in start.items()}
    state = {"master": start, "ema": start, "exp_avg": zero, "exp_avg_sq": zero}
    restore(engine, ema, FullTensors(state), updates=0)
    draws, losses = Draws(1, RECIPE.global_batch), {"loss": [], "rcl": []}
    for _ in range(steps):
        clean, noise, sigma, y, conditional = draws.next()
        x, t = OBJECTIVE.corrupt(clean, noise, sigma)

        def loss(prediction, auxiliary, clean=clean, noise=noise, sigma=sigma):
            mse = OBJECTIVE.loss(prediction, clean, noise, sigma)
            return mse + auxiliary.total(), (mse.detach(), auxiliary.losses["rcl"].detach().sum())

        mse, rcl = engine.micro_step(x, t, y, conditional, loss=loss)
        losses["loss"].append(float(mse))
        losses["rcl"].append(float(rcl))
        engine.step(RECIPE.lr)
    losses["fixed"] = fixed_loss(engine)
    engine.close()
    return losses


@torch.no_grad()
def fixed_loss(engine: Engine) -> float:
    """The mean squared error on 5,120 draws that are the same for every model."""
    model = engine.module.eval()
    draws, losses = Draws(7, 128), []
    for _ in range(40):
        clean, noise, sigma, y, conditional = draws.next()
        x, t = OBJECTIVE.corrupt(clean, noise, sigma)
        losses.append(float(OBJECTIVE.loss(model(x, t, y, conditional)[0], clean, noise, sigma)))
    return math.fsum(losses) / len(losses)


def published() -> dict:
    """What `train` returns, of the published classes and all steps."""
    every = load_file(FOLDER / f"{CASE}.safetensors")
    facts = json.loads((FOLDER / f"{CASE}.json").read_text())
    losses = {name: every[name].tolist() for name in ("loss", "rcl")}
    return {**losses, "fixed": facts["fixed_draw_loss"]["published"]}
