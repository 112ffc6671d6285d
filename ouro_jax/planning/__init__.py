"""Floor 6: what a run would need and cost on a machine, from programs compiled for it without it."""
