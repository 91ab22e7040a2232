"""Train networks: ``fit``, its settings and objectives, the training loop, checkpoints."""
