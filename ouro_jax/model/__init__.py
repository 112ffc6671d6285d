"""Floor 1: the looped language model and its exit rules; knows no files, flags or hosts."""
