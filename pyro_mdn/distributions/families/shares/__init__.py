"""Families of shares: numbers between two ends."""
