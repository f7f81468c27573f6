"""The optimizer step over sharded weights, averaged weights, and DeepSpeed behind an interface."""
