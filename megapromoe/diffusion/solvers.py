"""Solvers: what turns the outputs of a model, one after the other, into an image.

    solver = make_solver("heun", steps=50)
    for i, time in enumerate(solver.times):
        x_BCHW = solver.step(i, predict(x_BCHW, time), x_BCHW)

A solver names the model times at which it needs an output, and makes a step from each. `samplers.sample` is the loop
above with guidance, and `megapromoe.diffusers.ProMoEScheduler` gives the same solvers to pipelines of diffusers. Model
times are Python numbers, so decisions that depend on them need not wait for the device.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megapromoe.diffusion import multistep
from megapromoe.diffusion.objectives import (
    TIME_SCALE,
    DDPMSchedule,
    clean_from_noise,
    learned_log_variance,
    posterior_mean,
    shifted,
    split_output,
)

NoiseAt = Callable[[int], Tensor]
"""Step k = 1 .. steps-1 -> unit normal (B, C, H, W)."""


class Solver(Protocol):
    """A sampling method with a number of steps. A solver is used for one batch of images."""

    @property
    def times(self) -> Sequence[float]:
        """Model time, in [0, 1000], of each evaluation of the model."""

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        """The input of the next evaluation, or the images after the last one, float32 (B, C, H, W).

        Args:
            i: number of the evaluation, from 0 on, in this order.
            out_BCHW: raw output of the model for `x_BCHW` at `times[i]`, (B, C or 2C, H, W).
            x_BCHW: the input of the evaluation, float32.
            noise_at: noise of each step, for "ddpm".
        """

    def finished(self, i: int) -> int:
        """Number of steps that evaluation `i` finishes; 0 if it is in the middle of a step."""


def noise_levels(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from 1 to 0, evenly spaced and then shifted."""
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def _velocity(out_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    return out_BCHW[:, : x_BCHW.shape[1]].float()


class Euler:
    """Euler's method on dx/dsigma = velocity."""

    def __init__(self, steps: int, shift: float = 1.0):
        self.sigmas = noise_levels(steps, shift)
        self.times = [TIME_SCALE * sigma for sigma in self.sigmas[:-1]]

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        return x_BCHW + (self.sigmas[i + 1] - self.sigmas[i]) * _velocity(out_BCHW, x_BCHW)

    def finished(self, i: int) -> int:
        return i + 1


class Heun:
    """Heun's second-order method; the last step is Euler's, because the model is hardly trained at noise level 0.

    A step has an evaluation at its start and one at its end, after a trial step.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """

    def __init__(self, steps: int, shift: float = 1.0):
        self.sigmas = noise_levels(steps, shift)
        self.steps = steps
        ends = [sigma for start in range(steps) for sigma in self.sigmas[start : start + 2]]
        self.times = [TIME_SCALE * sigma for sigma in ends[:-1]]
        self._start: tuple[Tensor, Tensor] | None = None
        """Images and slope at the start of the present step."""

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        number, is_end = divmod(i, 2)
        width = self.sigmas[number + 1] - self.sigmas[number]
        slope = _velocity(out_BCHW, x_BCHW)
        if is_end and self._start is not None:
            x_BCHW, first = self._start
            slope, self._start = (first + slope) / 2, None
        elif number + 1 < self.steps:
            self._start = x_BCHW, slope
        return x_BCHW + width * slope

    def finished(self, i: int) -> int:
        return self.steps if i + 1 == len(self.times) else (i + 1) // 2 * (i % 2)


class _OnSchedule:
    """The common part of the methods of DDPM: evaluation k is at step steps - 1 - k of a respaced schedule."""

    def __init__(self, steps: int):
        self.schedule = DDPMSchedule(steps)
        self.times = [float(time) for time in reversed(self.schedule.times)]

    def at(self, i: int, device: torch.device) -> dict[str, Tensor]:
        """The coefficients of evaluation `i`."""
        return self.schedule.at(torch.full((1,), len(self.times) - 1 - i, device=device))

    def finished(self, i: int) -> int:
        return i + 1


class DDPMAncestral(_OnSchedule):
    """Ancestral sampling with the learned variance; the last step adds no noise.

    Source: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021 for variance and respacing.
    """

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        if noise_at is None:
            raise ValueError("sample.method 'ddpm' draws noise in each step: give noise_at, or use 'ddim'")
        at = self.at(i, x_BCHW.device)
        eps, v = split_output(out_BCHW, x_BCHW.shape[1])
        mean = posterior_mean(at, clean_from_noise(at, x_BCHW, eps), x_BCHW)
        if i + 1 < len(self.times):
            mean = mean + torch.exp(0.5 * learned_log_variance(at, v)) * noise_at(i + 1).to(mean)
        return mean


class DDIM(_OnSchedule):
    """Deterministic steps (eta 0). Source: Song et al. 2020 (DDIM), eq. 12."""

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        at = self.at(i, x_BCHW.device)
        eps, _ = split_output(out_BCHW, x_BCHW.shape[1])
        clean = clean_from_noise(at, x_BCHW, eps)
        return at["sqrt_alpha_bar_prev"] * clean + at["sqrt_one_minus_prev"] * eps


class Multistep:
    """A method of diffusers, on the noise levels of `Euler` or on the steps of `DDIM`."""

    def __init__(self, method: str, steps: int, shift: float, objective: str):
        self.is_flow = objective == "rf"
        if self.is_flow:
            levels = noise_levels(steps, shift)
            self.times = [TIME_SCALE * level for level in levels[:-1]]
        else:
            schedule = DDPMSchedule(steps)
            rows = dict(zip(schedule.ROWS, schedule.table.flip(1), strict=True))
            levels = [*(rows["sqrt_one_minus"] / rows["sqrt_alpha_bar"]).tolist(), 0.0]
            self.times = [float(time) for time in reversed(schedule.times)]
        self.scheduler = multistep.scheduler_at(method, levels, self.times, self.is_flow)

    def step(self, i: int, out_BCHW: Tensor, x_BCHW: Tensor, noise_at: NoiseAt | None = None) -> Tensor:
        channels = x_BCHW.shape[1]
        predicted = _velocity(out_BCHW, x_BCHW) if self.is_flow else split_output(out_BCHW, channels)[0]
        return self.scheduler.step(predicted, self.times[i], x_BCHW, return_dict=False)[0]

    def finished(self, i: int) -> int:
        return i + 1


def make_solver(method: str, steps: int, shift: float = 1.0, objective: str = "rf") -> Solver:
    """The solver of a sampling method.

    Args:
        method: "euler" or "heun" for rectified flow, "ddpm" or "ddim" for DDPM; "unipc" or "dpm_solver++", of the
            library diffusers, for both.
        steps: number of steps; Heun evaluates the model twice in each except the last.
        shift: of the noise levels, as in training; only for rectified flow.
        objective: what the model predicts, see `objectives.make_objective`; only for the methods of diffusers.

    Raises:
        ValueError: unknown method, or steps out of range.
        MethodUnavailable: the method needs diffusers, which is not installed.
    """
    if steps < 1:
        raise ValueError(f"sample.steps: {steps} is below 1")
    if method in multistep.METHODS:
        return Multistep(method, steps, shift, objective)
    if method == "euler":
        return Euler(steps, shift)
    if method == "heun":
        return Heun(steps, shift)
    if method == "ddpm":
        return DDPMAncestral(steps)
    if method == "ddim":
        return DDIM(steps)
    raise ValueError(f"sample.method: {method!r} is not known")
