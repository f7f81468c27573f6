"""Data sets, and the stream of batches made from them."""
