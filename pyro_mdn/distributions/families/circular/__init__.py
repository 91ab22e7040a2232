"""Families of angles, whose densities are periodic by themselves."""
