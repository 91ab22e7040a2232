"""Batches of rows from arrays, data sets and loaders, for a network or the members of an ensemble."""
