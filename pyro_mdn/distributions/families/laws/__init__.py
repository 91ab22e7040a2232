"""Families with independent outputs, each given by the law of one output."""
