"""Is this allocation fit to train on: what each rank finds out, and which node is to blame."""
