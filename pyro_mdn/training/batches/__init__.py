"""Batches of rows from arrays, data sets and loaders."""
