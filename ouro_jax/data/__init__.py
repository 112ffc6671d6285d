"""From text to batches: tokenise, pack into rows, mix, read at any position on any host."""
