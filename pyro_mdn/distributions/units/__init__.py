"""Units and supports of targets: maps to the space in which components live, and mixtures pushed through them."""
