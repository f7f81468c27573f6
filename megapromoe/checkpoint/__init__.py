"""Checkpoints and the run directory: file format, saving, pruning and resuming."""
