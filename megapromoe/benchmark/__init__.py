"""What our layer, training step and sampling cost beside other ways to do the same."""
