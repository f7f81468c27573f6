"""Expert-parallel training of ProMoE diffusion transformers."""

__version__ = "0.1.0"
