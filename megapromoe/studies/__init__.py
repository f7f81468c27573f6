"""Scaling studies: one recipe becomes many runs, one table, a few pictures."""
