"""The four conventions of what a model predicts and which time it takes, as options of a config. Imports no torch.

With x = (1 - σ) clean + σ noise and model time t = 1000 σ:

======  =================================================  ======================================================
rf      ours and ProMoE's: noise - clean, time 1000 σ      diffusion.objective=rf, model.time_input=dit
ddpm    DiT: the noise, at DDPM's step                     diffusion.objective=ddpm, model.time_input=dit
repa    REPA: noise - clean, time σ                        diffusion.objective=rf, model.time_input=repa
sit     SiT, DiffMoE's flow: clean - noise, time 1 - σ     diffusion.objective=rf, model.time_input=sit
======  =================================================  ======================================================

A `sit` model predicts the negative of our velocity. The readers negate its last layer; files with published names are
written with the original sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from megapromoe.config.options import Config
from megapromoe.config.resolve import check

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = ("rf", "ddpm", "repa", "sit")
_LAST_LAYER = "final_layer.linear."
_ODD_KINDS = ("master", "ema", "exp_avg")  # kinds whose sign changes with that of the output; exp_avg_sq holds squares
_METHODS = {"rf": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}

ASK = (
    "the file does not contain its training objective; {config} is assumed: otherwise give --objective ddpm (DiT),"
    " repa, sit (SiT and DiffMoE's flow, whose time runs from noise to data) or rf (ours, ProMoE)"
)


OF_RUN = (
    "the file does not contain its training objective; that of this run is assumed, {config}: for weights of SiT set"
    " model.time_input=sit, of REPA model.time_input=repa, both with diffusion.objective=rf"
)


def assumed_objective(config: Config, by_run: bool) -> str:
    """The note for a file without an objective; `by_run`: the config of a run that starts from it is assumed."""
    return (OF_RUN if by_run else ASK).format(config=describe(config))


def with_objective(config: Config, objective: str) -> Config:
    """`config` with the options of one of OBJECTIVES; unchanged if it has them already.

    Raises ConfigError if the model does not support them.
    """
    name = "ddpm" if objective == "ddpm" else "rf"
    time_input = objective if objective in ("repa", "sit") else "dit"
    if (config.diffusion.objective, config.model.time_input) == (name, time_input):
        return config
    diffusion = replace(config.diffusion, objective=name)
    if time_input != "dit":
        diffusion = replace(diffusion, time="uniform")  # as SiT and REPA train
    sample = config.sample
    if sample.method not in _METHODS[name]:
        sample = replace(sample, method=_METHODS[name][0])
    changed = replace(config, model=replace(config.model, time_input=time_input), diffusion=diffusion, sample=sample)
    check(changed)
    return changed


def describe(config: Config) -> str:
    """The two options that determine the convention, as on a command line."""
    return f"diffusion.objective={config.diffusion.objective} model.time_input={config.model.time_input}"


def in_our_sign(read: Callable[[str, str], Tensor], config: Config) -> Callable[[str, str], Tensor]:
    """Wraps `read` (kind, parameter) to convert between a file's convention of signs and ours, in both directions."""
    if config.model.time_input != "sit":
        return read

    def signed(kind: str, name: str) -> Tensor:
        tensor = read(kind, name)
        return -tensor if kind in _ODD_KINDS and name.startswith(_LAST_LAYER) else tensor

    return signed
