"""Diffusion: training objectives, samplers, random numbers, and generation of numbered images."""
