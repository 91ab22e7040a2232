"""Families of components: one file each, and what they share."""
