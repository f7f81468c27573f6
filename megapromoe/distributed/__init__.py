"""Ranks and process groups: launch environment, collectives with gradients, parameter layouts, hang detection."""
