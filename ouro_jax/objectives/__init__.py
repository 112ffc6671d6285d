"""Floor 2: per-token cross-entropy and the losses over the exit distribution."""
