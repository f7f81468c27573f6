"""Our sampling methods as a scheduler of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from megapromoe.config.options import SAMPLING_METHODS
from megapromoe.conversion.diffusers_folder import scheduler_settings
from megapromoe.conversion.state import config_from
from megapromoe.diffusers.transformer import DiffusersInputError
from megapromoe.diffusion.solvers import Solver, make_solver


class ProMoEScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A sampling method of `sample.method`, one step after the other.

    Its config also holds what other schedulers of diffusers need, so that they can take its place:

        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)

    Args:
        method: "euler" or "heun" for rectified flow, "ddpm" or "ddim" for DDPM, "unipc" or "dpm_solver++" for both.
        objective: what the model predicts, a value of `diffusion.objective`.
        shift: of the noise levels, as in training; only for rectified flow.

    Attributes:
        timesteps: model time of each evaluation of the model, float64 on the CPU, since it determines what the host
            does; set by `set_timesteps`.

    Raises ConfigError for a method that the objective does not have.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ]

    @register_to_config
    def __init__(self, method: str = "euler", objective: str = "rf", shift: float = 1.0):
        if method not in SAMPLING_METHODS:
            raise DiffusersInputError(f"method = {method!r}: must be one of {', '.join(SAMPLING_METHODS)}")
        config_from({"diffusion": {"objective": objective, "shift": float(shift)}, "sample": {"method": method}})
        settings = scheduler_settings(objective, float(shift))
        self.register_to_config(**settings | {"shift": float(shift)})
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self.num_inference_steps = 0
        self._solver: Solver | None = None
        self._evaluation = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begins a batch of images with a number of steps; Heun has two evaluations of the model in each but the last.

        Args:
            num_inference_steps: number of steps.
            device: of the images; `timesteps` stays on the CPU.

        Raises DiffusersInputError for a number out of range.
        """
        settings = self.config["method"], num_inference_steps, self.config["shift"], self.config["objective"]
        try:
            self._solver = make_solver(*settings)
        except ValueError as error:
            raise DiffusersInputError(f"num_inference_steps = {num_inference_steps}: {error}") from error
        self.timesteps = torch.tensor(self._solver.times, dtype=torch.float64)
        self.num_inference_steps, self._evaluation = num_inference_steps, 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The input of the model: the sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Makes a step from the output of the model, or a part of one for Heun.

        Args:
            model_output: raw output, (B, C, H, W) or, with a learned variance, (B, 2C, H, W).
            timestep: the next one of `timesteps`.
            sample: the input of the model (B, C, H, W).
            generator: for the noise of "ddpm".
            return_dict: False: a tuple.

        Raises DiffusersInputError for another timestep than the next one.
        """
        if self._evaluation >= len(self.timesteps):
            raise DiffusersInputError("timestep: all steps are made; call set_timesteps for the next batch")
        i, expected = self._evaluation, float(self.timesteps[self._evaluation])
        if abs(float(timestep) - expected) > 1e-3:
            raise DiffusersInputError(
                f"timestep = {float(timestep):g}: the next of scheduler.timesteps is {expected:g}"
            )
        assert self._solver is not None

        def noise(step: int) -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        result = self._solver.step(i, model_output, sample.float(), noise)
        self._evaluation += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def __len__(self) -> int:
        return 1000
