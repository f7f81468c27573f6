"""Multistep solvers of the library diffusers: UniPC and DPM-Solver++, of second order.

Both evaluate the model once in each step and extrapolate the predicted clean image from the step before; UniPC also
corrects the step when the model has been evaluated at its end. Only the update formulas are those of diffusers. The
noise levels are ours, so that a number of steps means the same with every method, and so is the initial noise; the
solvers draw no random numbers.

Source: Lu et al. 2022, "DPM-Solver++" (2M); Zhao et al. 2023, "UniPC" (B_2(h), order 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megapromoe.errors import ExitCode, UserError

METHODS = ("unipc", "dpm_solver++")
_FIRST_FLOW_LEVEL = 1 - 1e-6  # in place of 1, as in diffusers


class MethodUnavailable(UserError):
    """A sampling method needs a package that is not installed."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # packages are installed on all nodes alike


def check_available(method: str) -> None:
    """Raises MethodUnavailable if a method needs diffusers, and it cannot be imported."""
    if method in METHODS:
        _scheduler_class(method)


def scheduler_at(method: str, levels: Sequence[float], times: Sequence[float], is_flow: bool) -> Any:
    """The scheduler of diffusers for a method, at given noise levels.

    Its `step(output, time, x_BCHW)` is called for each time in turn, with images in float32.

    Args:
        method: one of `METHODS`.
        levels: steps + 1 noise levels, descending to 0: of a flow the share of noise, else the ratio of noise and
            signal.
        times: model time of each step.
        is_flow: the output is the velocity, noise - clean, and x = (1 - level) clean + level noise; otherwise the
            output is the noise, and x is scaled to unit variance.

    Raises MethodUnavailable without diffusers.
    """
    settings: dict[str, Any] = {"solver_order": 2, "prediction_type": "epsilon"}
    if is_flow:
        # At 1 the logarithm of the signal is infinite. A large shift has further levels close to 1.
        levels = [max(_FIRST_FLOW_LEVEL, (1 + levels[1]) / 2), *levels[1:]]
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = _scheduler_class(method)(**settings)
    scheduler.set_timesteps(len(times))
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(times)
    scheduler.set_begin_index(0)  # steps are counted: a search for the time would wait for the device
    return scheduler


def _scheduler_class(method: str) -> Any:
    """The scheduler of diffusers for a method. Raises MethodUnavailable."""
    try:
        import diffusers  # slow to import
    except ImportError as error:
        raise MethodUnavailable(
            f"sample.method = {method!r} needs diffusers: pip install 'megapromoe[images]', or use euler or heun"
            " (diffusion.objective=rf), ddpm or ddim (diffusion.objective=ddpm)"
        ) from error
    return diffusers.UniPCMultistepScheduler if method == "unipc" else diffusers.DPMSolverMultistepScheduler
