"""Mixtures of Gaussians: the operations that only normal components have."""
