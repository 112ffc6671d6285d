"""What a run wrote, as tables for the terminal and one self-contained page."""
