"""Arithmetic on raw tensors: the log-density of a mixture with its gradient, and distribution functions."""
