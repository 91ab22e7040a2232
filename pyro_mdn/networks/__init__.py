"""Networks whose output is a mixture, and ensembles of them."""
