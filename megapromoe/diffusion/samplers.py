"""Samplers: from noise to images, with classifier-free guidance.

    predict = guided(model, labels_B, null_class, scale=1.5)
    images_BCHW = sample(predict, image_noise(seed, indices, shape), "heun", steps=50)

A sampler has no randomness of its own: the caller gives the initial noise and, for ancestral sampling, the
noise of each step, drawn per image. So an image depends on its batch only through a model whose output does: see
`ModelConfig.images_depend_on_batch`. All images of a step share one time, which is a Python number: what depends on it
is decided on the host, without waiting for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megapromoe.diffusion.objectives import (
    TIME_SCALE,
    DDPMSchedule,
    clean_from_noise,
    learned_log_variance,
    posterior_mean,
    shifted,
    split_output,
)

Predict = Callable[[Tensor, float], Tensor]
"""(x_BCHW, model time in [0, 1000]) -> raw output, (B, C or 2C, H, W)."""
NoiseAt = Callable[[int], Tensor]
"""Step k = 1 .. steps-1 -> unit normal (B, C, H, W)."""
Progress = Callable[[int], None]
"""Called with the number of steps done."""


def guided(
    model: Callable,
    labels_B: Tensor,
    null_class: int,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    two_calls: bool = False,
) -> Predict:
    """The model as a function of (x, time) for fixed labels, with classifier-free guidance.

    Guidance is v_null + scale · (v_cond - v_null) on all C channels of the prediction; a learned variance
    stays the conditional's. Both passes are one model call, ordered [conditional | null], or `two_calls`. Where
    guidance does not act (scale 1, or a time outside of the interval) only the label's own pass is made. Images
    whose label is the null class get the null pass.

    Args:
        model: called as model(x, t_B, labels, conditional=n) -> (raw output, aux), the first n images being
            conditional.
        labels_B: int64 class of each image, on the model's device.
        null_class: the label that means "no class".
        scale: 1 is no guidance.
        low, high: normalised times, model time / 1000, between which guidance acts, both included.
        two_calls: for a model whose output depends on its batch (`ModelConfig.images_depend_on_batch`): the conditional
            images are one batch and all images under the null class another. Their number of calls depends on scale and
            time alone, not on the labels, so that the ranks of an expert-parallel group make the same calls.

    Source: Ho and Salimans 2022; Kynkäänniemi et al. 2024 (guidance interval); two calls: sample.py of the ProMoE
    release.
    """
    is_null_B = labels_B == null_class
    conditional_N = torch.nonzero(~is_null_B)[:, 0]
    null_M = torch.nonzero(is_null_B)[:, 0]
    everyone_B = torch.arange(len(labels_B), device=labels_B.device)
    n = len(conditional_N)

    def call(x_BCHW: Tensor, time: float, rows: Tensor, conditional: int) -> Tensor:
        """Raw output of images `rows`: the first `conditional` under their labels, the others under the null class."""
        y = labels_B[rows].clone()
        y[conditional:] = null_class
        t = torch.full((len(rows),), time, dtype=torch.float32, device=x_BCHW.device)
        return model(x_BCHW[rows], t, y, conditional=conditional)[0].float()

    def both_passes(x_BCHW: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Raw outputs of the n conditional images, and of all images under the null class."""
        if not two_calls:
            both = call(x_BCHW, time, torch.cat([conditional_N, everyone_B]), n)
            return both[:n], both[n:].clone()
        # Without conditional images the first call is of one null image, whose output is dropped.
        first = call(x_BCHW, time, conditional_N if n else everyone_B[:1], n)
        return first[:n], call(x_BCHW, time, everyone_B, 0)

    def predict(x_BCHW: Tensor, time: float) -> Tensor:
        acts = scale != 1 and low <= time / TIME_SCALE <= high
        if not acts or (n == 0 and not two_calls):
            rows_B = torch.cat([conditional_N, null_M])
            out = call(x_BCHW, time, rows_B, n)
            return torch.empty_like(out).index_copy_(0, rows_B, out)
        C = x_BCHW.shape[1]
        conditional, result = both_passes(x_BCHW, time)
        null = result[conditional_N, :C]
        steered = torch.cat([null + scale * (conditional[:, :C] - null), conditional[:, C:]], dim=1)
        return result.index_copy_(0, conditional_N, steered)

    return predict


@torch.no_grad()
def sample(
    predict: Predict,
    noise_BCHW: Tensor,
    method: str,
    steps: int,
    shift: float = 1.0,
    noise_at: NoiseAt | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Images (B, C, H, W), float32, drawn by `steps` steps of a method.

    Args:
        predict: raw output of the model, see `guided`.
        noise_BCHW: unit normal, on the model's device.
        method: "euler" or "heun" for rectified flow, "ddpm" or "ddim" for DDPM.
        steps: number of steps; Heun calls the model twice in each but the last.
        shift: of the noise levels, rectified flow only: the training's.
        noise_at: "ddpm" only: unit normal of step k = 1 .. steps-1, like `noise_BCHW`.
        progress: called after each step with the number of steps done.

    Raises:
        ValueError: unknown method, steps out of range, or "ddpm" without `noise_at`.
    """
    if method not in SAMPLERS:
        raise ValueError(f"sample.method: {method!r} is not known; use one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise ValueError(f"sample.steps: {steps} is below 1")
    done = progress or (lambda step: None)
    return SAMPLERS[method](predict, noise_BCHW.float(), steps, shift, noise_at, done)


def _velocity(predict: Predict, x_BCHW: Tensor, sigma: float) -> Tensor:
    return predict(x_BCHW, TIME_SCALE * sigma)[:, : x_BCHW.shape[1]].float()


def _noise_levels(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from 1 to 0, evenly spaced and then shifted."""
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def _euler(
    predict: Predict, x_BCHW: Tensor, steps: int, shift: float, noise_at: NoiseAt | None, done: Progress
) -> Tensor:
    """Euler's method on dx/dsigma = velocity."""
    sigmas = _noise_levels(steps, shift)
    for i in range(steps):
        x_BCHW = x_BCHW + (sigmas[i + 1] - sigmas[i]) * _velocity(predict, x_BCHW, sigmas[i])
        done(i + 1)
    return x_BCHW


def _heun(
    predict: Predict, x_BCHW: Tensor, steps: int, shift: float, noise_at: NoiseAt | None, done: Progress
) -> Tensor:
    """Heun's second-order method; the last step is Euler's, for the model learnt little at noise level 0.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    sigmas = _noise_levels(steps, shift)
    for i in range(steps):
        width = sigmas[i + 1] - sigmas[i]
        slope = _velocity(predict, x_BCHW, sigmas[i])
        if i + 1 < steps:
            slope = (slope + _velocity(predict, x_BCHW + width * slope, sigmas[i + 1])) / 2
        x_BCHW = x_BCHW + width * slope
        done(i + 1)
    return x_BCHW


def _ddpm(
    predict: Predict, x_BCHW: Tensor, steps: int, shift: float, noise_at: NoiseAt | None, done: Progress
) -> Tensor:
    """Ancestral sampling with the learned variance; the last step adds no noise.

    Source: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021 for variance and respacing.
    """
    if noise_at is None:
        raise ValueError("sample.method 'ddpm' draws noise in each step: give noise_at, or use 'ddim'")
    schedule = DDPMSchedule(steps)
    for k, i in enumerate(reversed(range(steps)), start=1):
        at = schedule.at(torch.tensor([i], device=x_BCHW.device))
        eps, v = split_output(predict(x_BCHW, float(schedule.times[i])), x_BCHW.shape[1])
        mean = posterior_mean(at, clean_from_noise(at, x_BCHW, eps), x_BCHW)
        if i > 0:
            mean = mean + torch.exp(0.5 * learned_log_variance(at, v)) * noise_at(k).to(mean)
        x_BCHW = mean
        done(k)
    return x_BCHW


def _ddim(
    predict: Predict, x_BCHW: Tensor, steps: int, shift: float, noise_at: NoiseAt | None, done: Progress
) -> Tensor:
    """Deterministic steps (eta 0). Source: Song et al. 2020 (DDIM), eq. 12."""
    schedule = DDPMSchedule(steps)
    for k, i in enumerate(reversed(range(steps)), start=1):
        at = schedule.at(torch.tensor([i], device=x_BCHW.device))
        eps, _ = split_output(predict(x_BCHW, float(schedule.times[i])), x_BCHW.shape[1])
        clean = clean_from_noise(at, x_BCHW, eps)
        x_BCHW = at["sqrt_alpha_bar_prev"] * clean + at["sqrt_one_minus_prev"] * eps
        done(k)
    return x_BCHW


SAMPLERS = {"euler": _euler, "heun": _heun, "ddpm": _ddpm, "ddim": _ddim}
