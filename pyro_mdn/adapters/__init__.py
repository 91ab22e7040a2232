"""What ArviZ, xarray, plots and scikit-learn take, built from mixtures and posteriors."""
