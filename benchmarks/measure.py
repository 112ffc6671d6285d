"""What the benchmarks share: timing one call, and printing a figure."""

import time
from collections.abc import Callable

import jax


def seconds(function: Callable, *args) -> float:
    """Wall time of one call, its arrays computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def shown(value: str | float) -> str:
    """A figure in a few characters."""
    return value if isinstance(value, str) else f"{value:,.3g}" if value < 10 else f"{value:,.1f}"
