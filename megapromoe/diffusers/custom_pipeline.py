"""What `DiffusionPipeline.from_pretrained(folder, custom_pipeline=CUSTOM_PIPELINE)` executes.

diffusers copies this file to its cache and takes the pipeline in it, which is that of the installed package.
"""

from megapromoe.diffusers.pipeline import ProMoEPipeline

__all__ = ["ProMoEPipeline"]
