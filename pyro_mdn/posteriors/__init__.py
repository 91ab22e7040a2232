"""Posteriors over latent weights, and their predictive mixtures."""
