"""Checks an allocation before training: each rank measures, rank 0 evaluates and names the faulty nodes."""
