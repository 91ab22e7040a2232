"""Families of counts: numbers 0, 1, 2, ..."""
