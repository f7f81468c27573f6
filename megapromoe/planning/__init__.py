"""What a layout would need and cost, from the configuration alone, and the search for a good one. No torch."""
