"""Components whose outputs are of different families."""
