"""A run's folder: lock, checkpoints, provenance, heartbeat, reading a trained run."""
