"""Families with a probability of their own for zero."""
