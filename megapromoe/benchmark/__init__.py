"""Benchmarks of the MoE layer, the training step and sampling, compared with other implementations."""
