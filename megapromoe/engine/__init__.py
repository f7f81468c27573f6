"""The optimizer side of a model: DeepSpeed behind a small interface, partitions, and averaged weights."""
