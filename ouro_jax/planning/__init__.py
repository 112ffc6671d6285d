"""Floor 6: what a run needs and costs on a machine, from programs compiled for it without it."""
