"""Floor 7: one small file per verb; parsing and printing, no logic."""
