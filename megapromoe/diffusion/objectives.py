"""Training objectives: how clean images are corrupted, and what the model's raw output is scored against.

    objective = make_objective(config)
    x_BCHW, t_B = objective.corrupt(clean_BCHW, noise_BCHW, u_B)
    loss = objective.loss(model(x_BCHW, t_B, ...), clean_BCHW, noise_BCHW, u_B)

Pure functions of their arguments: `u_B`, uniform in (0, 1), is the only randomness of time. Everything is
float32.

B images, C channels, H height, W width. `t_B` is the model's time input, float32 in [0, 1000].
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megapromoe.config.options import Config

TIME_SCALE = 1000.0  # model time of pure noise; also the number of DDPM steps


class Objective(Protocol):
    """What the trainer needs from an objective."""

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy images x_BCHW and model time t_B."""

    def losses_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Loss of each image, averaged over its elements."""

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Scalar: mean of `losses_B`."""


def make_objective(config: Config) -> Objective:
    """The objective named by `config.diffusion.objective`.

    Raises:
        ValueError: the name is unknown.
    """
    d = config.diffusion
    if d.objective == "rf":
        return RectifiedFlow(d.time, d.logit_mean, d.logit_std, d.mode_scale, d.shift)
    if d.objective == "ddpm":
        return DDPM()
    raise ValueError(f"diffusion.objective: {d.objective!r} is not known; use 'rf' or 'ddpm'")


def mean_of_image(x_BCHW: Tensor) -> Tensor:
    """Mean over all but the first axis."""
    return x_BCHW.flatten(1).mean(1)


def per_image(x_B: Tensor) -> Tensor:
    """(B) as (B, 1, 1, 1), to multiply images with."""
    return x_B[:, None, None, None]


# Rectified flow


Level = TypeVar("Level", float, Tensor)


def shifted(sigma: Level, shift: float) -> Level:
    """Noise level moved towards 1 for shift > 1; a tensor or a number in [0, 1].

    Source: Esser et al. 2024 (Stable Diffusion 3), eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths from data to noise; the model predicts their velocity, noise - clean.

    x = (1 - sigma) clean + sigma noise, and model time is 1000 sigma.

    Args:
        time: density of sigma: "logit_normal", "mode" or "uniform".
        logit_mean, logit_std: of the normal whose sigmoid is sigma.
        mode_scale: s of mode sampling; 0 is uniform.
        shift: > 1 spends more time at high noise; 1 is none.

    Raises:
        ValueError: `time` is unknown.

    Source: Liu et al. 2022; Esser et al. 2024 (Stable Diffusion 3), section 3.1 for the densities.
    """

    time: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.time not in ("logit_normal", "mode", "uniform"):
            raise ValueError(f"time: {self.time!r} is not known; use 'logit_normal', 'mode' or 'uniform'")

    def sigma(self, u_B: Tensor) -> Tensor:
        """Noise level in [0, 1] of uniform draws, by the inverse of its distribution function."""
        u_B = u_B.float()
        if self.time == "logit_normal":
            sigma_B = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u_B))
        elif self.time == "mode":
            sigma_B = 1 - u_B - self.mode_scale * (torch.cos(0.5 * math.pi * u_B) ** 2 - 1 + u_B)
        else:
            sigma_B = u_B
        return shifted(sigma_B, self.shift)

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy images x_BCHW and model time t_B = 1000 sigma."""
        sigma_B = self.sigma(u_B)
        x_BCHW = torch.lerp(clean_BCHW.float(), noise_BCHW.float(), per_image(sigma_B))
        return x_BCHW, TIME_SCALE * sigma_B

    def losses_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Mean squared error of the velocity per image; a learned variance, channels C and on, is ignored."""
        velocity_BCHW = out_BCHW[:, : clean_BCHW.shape[1]].float()
        return mean_of_image((velocity_BCHW - (noise_BCHW.float() - clean_BCHW.float())) ** 2)

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Scalar: mean of `losses_B`."""
        return self.losses_B(out_BCHW, clean_BCHW, noise_BCHW, u_B).mean()


# DDPM


class DDPMSchedule:
    """Coefficients of a diffusion over some of the 1000 training steps; index 0 is the least noise.

    Args:
        steps: how many to keep, evenly spaced, first and last included; one step alone is the last.

    Attributes:
        times: list of the kept training steps (model times), ascending.
        table: the rows below as one float64 tensor (rows, steps), so that one copy takes them to a device.

    Raises:
        ValueError: steps is not within 1..1000.

    Source: Ho et al. 2020 (linear betas); Nichol and Dhariwal 2021 (respacing, log-variance clipped at the
    first step).
    """

    ROWS = (
        "sqrt_alpha_bar",  # x_t = sqrt_alpha_bar · clean + sqrt_one_minus · noise
        "sqrt_one_minus",
        "sqrt_alpha_bar_prev",  # the same two, one step nearer to the data
        "sqrt_one_minus_prev",
        "mean_clean",  # posterior mean of x_{t-1} = mean_clean · clean + mean_x · x_t
        "mean_x",
        "log_var_min",  # posterior variance: the least a step can have
        "log_var_max",  # beta: the most
    )

    def __init__(self, steps: int = 1000):
        total = int(TIME_SCALE)
        if not 1 <= steps <= total:
            raise ValueError(f"steps: {steps} is not within 1..{total}, the steps that DDPM was trained with")
        if steps == 1:
            self.times = [total - 1]
        else:
            # A running sum, as published, because its rounding decides ties such as 499.5.
            strides = [0.0] + [(total - 1) / (steps - 1)] * (steps - 1)
            self.times = [round(time) for time in itertools.accumulate(strides)]
        bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, total, dtype=torch.float64), 0)[self.times]
        prev = torch.cat([bar.new_ones(1), bar[:-1]])
        alpha = bar / prev
        beta = 1 - alpha
        variance = beta * (1 - prev) / (1 - bar)
        # The first step's posterior variance is 0: its logarithm is taken from the second.
        variance = torch.cat([variance[1:2] if steps > 1 else beta, variance[1:]])
        rows = {
            "sqrt_alpha_bar": bar.sqrt(),
            "sqrt_one_minus": (1 - bar).sqrt(),
            "sqrt_alpha_bar_prev": prev.sqrt(),
            "sqrt_one_minus_prev": (1 - prev).sqrt(),
            "mean_clean": beta * prev.sqrt() / (1 - bar),
            "mean_x": (1 - prev) * alpha.sqrt() / (1 - bar),
            "log_var_min": variance.log(),
            "log_var_max": beta.log(),
        }
        self.table = torch.stack([rows[name] for name in self.ROWS])
        self._table_on = lru_cache(maxsize=None)(lambda device: self.table.float().to(device))

    def at(self, step_B: Tensor) -> dict[str, Tensor]:
        """The coefficients of each image's step, by name: (B, 1, 1, 1) float32 on the device of `step_B`."""
        columns = self._table_on(step_B.device)[:, step_B]
        return {name: per_image(column_B) for name, column_B in zip(self.ROWS, columns, strict=True)}


def clean_from_noise(at: dict, x_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
    """The clean images that x and the noise in it imply."""
    return (x_BCHW - at["sqrt_one_minus"] * eps_BCHW) / at["sqrt_alpha_bar"]


def posterior_mean(at: dict, clean_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Mean of x_{t-1} given x_t and the clean images. Source: Ho et al. 2020, eq. 7."""
    return at["mean_clean"] * clean_BCHW + at["mean_x"] * x_BCHW


def learned_log_variance(at: dict, v_BCHW: Tensor) -> Tensor:
    """Log-variance from the model's second half: -1 gives the posterior's, +1 beta's.

    Source: Nichol and Dhariwal 2021, eq. 15.
    """
    share = (v_BCHW + 1) / 2
    return share * at["log_var_max"] + (1 - share) * at["log_var_min"]


def split_output(out_BCHW: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Noise and variance halves of a raw output, float32.

    Raises:
        ValueError: the output does not have 2C channels.
    """
    if out_BCHW.shape[1] != 2 * channels:
        raise ValueError(
            f"DDPM learns the variance and needs 2 x {channels} output channels, got {out_BCHW.shape[1]}: "
            "set model.learn_sigma=true"
        )
    eps_BCHW, v_BCHW = out_BCHW.float().split(channels, dim=1)
    return eps_BCHW, v_BCHW


def normal_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of two diagonal normals, elementwise, in nats."""
    ratio = torch.exp(log_var_p - log_var_q)
    return 0.5 * (log_var_q - log_var_p - 1 + ratio + (mean_p - mean_q) ** 2 * torch.exp(-log_var_q))


def pixel_nll(x_BCHW: Tensor, mean_BCHW: Tensor, log_var_BCHW: Tensor) -> Tensor:
    """Negative log-probability under a normal, elementwise in nats, of values in [-1, 1] of 256 levels.

    The outermost bins reach to infinity. The normal's distribution function is the tanh approximation that
    the published objective uses, and probabilities are floored at 1e-12.

    Source: Ho et al. 2020, eq. 13.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = torch.exp(-0.5 * log_var_BCHW)
    above = cdf(inverse_std * (x_BCHW - mean_BCHW + 1 / 255))
    below = cdf(inverse_std * (x_BCHW - mean_BCHW - 1 / 255))
    mass = torch.where(x_BCHW < -0.999, above, torch.where(x_BCHW > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


class DDPM:
    """Noise prediction with a learned variance range, over 1000 steps with linear betas.

    The loss is the mean squared error of the noise plus the variational term in bits, which trains the
    variance alone: its gradient does not reach the predicted noise.

    Source: Peebles and Xie 2023 (DiT), after Nichol and Dhariwal 2021, eq. 16 (with lambda 1, one step's term
    per image).
    """

    def __init__(self) -> None:
        self.schedule = DDPMSchedule()

    def step(self, u_B: Tensor) -> Tensor:
        """Step of each image, int64 in 0..999; the largest float32 below 1 is still step 999."""
        return (u_B.float() * TIME_SCALE).long()

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy images x_BCHW and model time t_B, the step number."""
        step_B = self.step(u_B)
        at = self.schedule.at(step_B)
        x_BCHW = at["sqrt_alpha_bar"] * clean_BCHW.float() + at["sqrt_one_minus"] * noise_BCHW.float()
        return x_BCHW, step_B.float()

    def variational_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Variational term of each image, bits per element.

        The KL divergence from the true posterior to the model's; at step 0 the likelihood of the data.
        """
        clean_BCHW = clean_BCHW.float()
        step_B = self.step(u_B)
        at = self.schedule.at(step_B)
        x_BCHW, _ = self.corrupt(clean_BCHW, noise_BCHW, u_B)
        eps_BCHW, v_BCHW = split_output(out_BCHW, clean_BCHW.shape[1])
        log_var_BCHW = learned_log_variance(at, v_BCHW)
        mean_BCHW = posterior_mean(at, clean_from_noise(at, x_BCHW, eps_BCHW), x_BCHW)
        true_mean_BCHW = posterior_mean(at, clean_BCHW, x_BCHW)
        kl_B = mean_of_image(normal_kl(true_mean_BCHW, at["log_var_min"], mean_BCHW, log_var_BCHW))
        nll_B = mean_of_image(pixel_nll(clean_BCHW, mean_BCHW, log_var_BCHW))
        return torch.where(step_B == 0, nll_B, kl_B) / math.log(2)

    def losses_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Squared error of the noise plus the variational term, per image.

        Raises:
            ValueError: the output does not have 2C channels.
        """
        eps_BCHW, v_BCHW = split_output(out_BCHW, clean_BCHW.shape[1])
        frozen_mean = torch.cat([eps_BCHW.detach(), v_BCHW], dim=1)
        squared_B = mean_of_image((eps_BCHW - noise_BCHW.float()) ** 2)
        return squared_B + self.variational_B(frozen_mean, clean_BCHW, noise_BCHW, u_B)

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Scalar: mean of `losses_B`."""
        return self.losses_B(out_BCHW, clean_BCHW, noise_BCHW, u_B).mean()
