"""Floor 6: runs that answer a question together: sweeps."""
