"""From data to a trained network: objectives, the training loop, checkpoints."""
