"""Training runs on Ray Train: workers, checkpoints, validation, logging, export."""
