"""Generating images from a trained run."""
