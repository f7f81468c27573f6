"""Scaling studies: many runs from one recipe, with tables and plots of their results."""
