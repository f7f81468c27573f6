"""Estimates of memory, traffic and time of a layout from the configuration, and a search for the best one. No torch."""
