"""Data sets, the latent format and its encoding job, and the stream of training samples."""
