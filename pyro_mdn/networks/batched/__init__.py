"""Many networks in one pass: draws of the weights, or members of an ensemble."""
