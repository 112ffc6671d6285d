"""Floor 5: the curriculum, the optimizer step, the trainer, and what a run writes."""
