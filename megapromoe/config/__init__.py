"""The configuration of a run: options, rules between them, presets, and how they are read in layers. No torch."""
