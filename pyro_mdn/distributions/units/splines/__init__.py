"""Splines: warps through the quantiles of targets."""
