"""Models of megapromoe in the library diffusers: model, scheduler and pipeline; `docs/convert.md` describes them."""

from megapromoe.diffusers.pipeline import CUSTOM_PIPELINE, ProMoEPipeline
from megapromoe.diffusers.scheduler import ProMoEScheduler
from megapromoe.diffusers.transformer import (
    DiffusersInputError,
    ProMoETransformer2DModel,
    ProMoETransformer2DModelOutput,
)

__all__ = [
    "CUSTOM_PIPELINE",
    "DiffusersInputError",
    "ProMoEPipeline",
    "ProMoEScheduler",
    "ProMoETransformer2DModel",
    "ProMoETransformer2DModelOutput",
]
