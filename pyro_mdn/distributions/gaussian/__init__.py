"""Mixtures of Gaussians: what only normal components have in closed form."""
