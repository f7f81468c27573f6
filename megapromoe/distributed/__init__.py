"""Ranks and process groups: the launcher's environment, collectives with gradients, parameter layouts, hangs."""
