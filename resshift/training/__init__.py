"""Training without Ray: the step, losses, optimiser, sharding, checkpoints."""
