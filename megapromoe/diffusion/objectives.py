"""Training objectives: how clean images are corrupted, and the loss of the model's raw output.

    objective = make_objective(config)
    x_BCHW, t_B = objective.corrupt(clean_BCHW, noise_BCHW, u_B)
    loss = objective.loss(model(x_BCHW, t_B, ...), clean_BCHW, noise_BCHW, u_B)

The functions are pure: time depends only on `u_B`, which the caller draws uniformly from (0, 1). Everything is computed
in float32.

Shape letters: B images, C channels, H height, W width. `t_B` is the model's time input, float32 in [0, 1000].
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
    """The interface of an objective."""

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns noisy images x_BCHW and model times t_B."""

    def losses_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """The loss of each image, averaged over its elements, (B,)."""

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """The mean of `losses_B`, scalar."""


def make_objective(config: Config) -> Objective:
    """The objective named by `config.diffusion.objective`.

    Raises:
        ValueError: the name is unknown.
    """
    d = config.diffusion
    if d.objective == "rf":
        return RectifiedFlow(d.time, d.logit_mean, d.logit_std, d.mode_scale, config.time_shift)
    if d.objective == "ddpm":
        return DDPM()
    raise ValueError(f"diffusion.objective: {d.objective!r} is not known; use 'rf' or 'ddpm'")


def mean_of_image(x_BCHW: Tensor) -> Tensor:
    """Mean over all dimensions but the first, (B,)."""
    return x_BCHW.flatten(1).mean(1)


def per_image(x_B: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, 1, 1), which broadcasts over images."""
    return x_B[:, None, None, None]


# Rectified flow


Level = TypeVar("Level", float, Tensor)


def shifted(sigma: Level, shift: float) -> Level:
    """Moves a noise level in [0, 1], a tensor or a number, towards 1 if shift > 1.

    Source: Esser et al. 2024 (Stable Diffusion 3), eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: straight paths from data to noise, whose velocity, noise - clean, the model predicts.

    x = (1 - sigma) clean + sigma noise, and model time is 1000 sigma.

    Args:
        time: density of sigma: "logit_normal", "mode" or "uniform".
        logit_mean, logit_std: of the normal distribution whose sigmoid is sigma ("logit_normal").
        mode_scale: s of mode sampling ("mode"); 0 is uniform.
        shift: > 1 samples high noise levels more often; 1 does not shift.

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
        """Noise levels in [0, 1] from uniform numbers, by the inverse of the distribution function."""
        u_B = u_B.float()
        if self.time == "logit_normal":
            sigma_B = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u_B))
        elif self.time == "mode":
            sigma_B = 1 - u_B - self.mode_scale * (torch.cos(0.5 * math.pi * u_B) ** 2 - 1 + u_B)
        else:
            sigma_B = u_B
        return shifted(sigma_B, self.shift)

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns noisy images x_BCHW and model times t_B = 1000 sigma."""
        sigma_B = self.sigma(u_B)
        x_BCHW = torch.lerp(clean_BCHW.float(), noise_BCHW.float(), per_image(sigma_B))
        return x_BCHW, TIME_SCALE * sigma_B

    def losses_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Mean squared error of the velocity of each image; a learned variance, channels from C on, is ignored."""
        velocity_BCHW = out_BCHW[:, : clean_BCHW.shape[1]].float()
        return mean_of_image((velocity_BCHW - (noise_BCHW.float() - clean_BCHW.float())) ** 2)

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """The mean of `losses_B`, scalar."""
        return self.losses_B(out_BCHW, clean_BCHW, noise_BCHW, u_B).mean()


# DDPM


class DDPMSchedule:
    """Coefficients of a diffusion over some of the 1000 training steps; index 0 is the least noise.

    Args:
        steps: number of steps, evenly spaced and including the first and last; a single step is the last.

    Attributes:
        times: the training steps (model times) that are used, ascending.
        table: the coefficients `ROWS` as one float64 tensor (rows, steps), which needs one copy to a device.

    Raises:
        ValueError: steps is not within 1..1000.

    Source: Ho et al. 2020 (linear betas); Nichol and Dhariwal 2021 (respacing, log-variance clipped at the
    first step).
    """

    ROWS = (
        "sqrt_alpha_bar",  # x_t = sqrt_alpha_bar · clean + sqrt_one_minus · noise
        "sqrt_one_minus",
        "sqrt_alpha_bar_prev",  # the same two at the step before, which has less noise
        "sqrt_one_minus_prev",
        "mean_clean",  # posterior mean of x_{t-1} = mean_clean · clean + mean_x · x_t
        "mean_x",
        "log_var_min",  # posterior variance: the lower bound of a learned variance
        "log_var_max",  # beta: the upper bound
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
        """The coefficients of the step of each image: name -> (B, 1, 1, 1), float32 on the device of `step_B`."""
        columns = self._table_on(step_B.device)[:, step_B]
        return {name: per_image(column_B) for name, column_B in zip(self.ROWS, columns, strict=True)}


def clean_from_noise(at: dict, x_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
    """The clean images, from noisy images x and their noise."""
    return (x_BCHW - at["sqrt_one_minus"] * eps_BCHW) / at["sqrt_alpha_bar"]


def posterior_mean(at: dict, clean_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Mean of x_{t-1} given x_t and the clean images. Source: Ho et al. 2020, eq. 7."""
    return at["mean_clean"] * clean_BCHW + at["mean_x"] * x_BCHW


def learned_log_variance(at: dict, v_BCHW: Tensor) -> Tensor:
    """Log-variance from the second half of the model's output: -1 gives that of the posterior, +1 that of beta.

    Source: Nichol and Dhariwal 2021, eq. 15.
    """
    share = (v_BCHW + 1) / 2
    return share * at["log_var_max"] + (1 - share) * at["log_var_min"]


def split_output(out_BCHW: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Splits a raw output into predicted noise and variance (B, C, H, W), float32.

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
    """Negative log-likelihood of values in [-1, 1] with 256 levels under a normal, elementwise in nats.

    The outermost bins extend to infinity. The distribution function of the normal is the tanh approximation of the
    published objective, and probabilities are at least 1e-12.

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
    """DDPM: noise prediction with a learned variance, over 1000 steps with linear betas.

    The loss is the mean squared error of the noise plus the variational term in bits. The variational term trains only
    the variance: the predicted noise in it is detached.

    Source: Peebles and Xie 2023 (DiT), after Nichol and Dhariwal 2021, eq. 16 (with lambda 1, and the term of one step
    for each image).
    """

    def __init__(self) -> None:
        self.schedule = DDPMSchedule()

    def step(self, u_B: Tensor) -> Tensor:
        """Step of each image, int64 in 0..999; the largest float32 below 1 gives step 999."""
        return (u_B.float() * TIME_SCALE).long()

    def corrupt(self, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns noisy images x_BCHW and model times t_B, which are step numbers."""
        step_B = self.step(u_B)
        at = self.schedule.at(step_B)
        x_BCHW = at["sqrt_alpha_bar"] * clean_BCHW.float() + at["sqrt_one_minus"] * noise_BCHW.float()
        return x_BCHW, step_B.float()

    def variational_B(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """Variational term of each image, in bits per element.

        The KL divergence from the true posterior to that of the model; at step 0 the negative log-likelihood of the
        data.
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
        """Mean squared error of the noise plus the variational term, for each image.

        Raises:
            ValueError: the output does not have 2C channels.
        """
        eps_BCHW, v_BCHW = split_output(out_BCHW, clean_BCHW.shape[1])
        detached_mean = torch.cat([eps_BCHW.detach(), v_BCHW], dim=1)
        squared_B = mean_of_image((eps_BCHW - noise_BCHW.float()) ** 2)
        return squared_B + self.variational_B(detached_mean, clean_BCHW, noise_BCHW, u_B)

    def loss(self, out_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> Tensor:
        """The mean of `losses_B`, scalar."""
        return self.losses_B(out_BCHW, clean_BCHW, noise_BCHW, u_B).mean()
