"""Answering: prefill, decode, exit rules at work, sampling, text in and out."""
