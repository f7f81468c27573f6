"""The optimizer side of training: one step over sharded weights, averaged weights, and DeepSpeed behind a protocol."""
