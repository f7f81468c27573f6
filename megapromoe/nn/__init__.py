"""The network: DiT, its layers, tensor parallelism, and building a model for a mesh."""
