"""The network: DiT, its layers, tensor parallelism, and how a model is built for a mesh."""
