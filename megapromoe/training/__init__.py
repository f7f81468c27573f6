"""Training: start-up, the DeepSpeed engine, averaged weights, checkpoints, metrics, the loop."""
