"""Process groups, collectives with gradients, how parameters are sliced, and how tokens travel."""
