"""Synthetic tasks: rows that are made when they are read, and problems held out of them."""
