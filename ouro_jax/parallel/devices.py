"""What the devices at hand can do at most: the denominator of every share of peak."""

import functools
import time

import jax
import jax.numpy as jnp

from ouro_jax.parallel.chips import chip_of


def peak_flops(dtype: str) -> float:
    """FLOP/s of all devices together: from the table, or a matrix product timed here and now."""
    if chip := chip_of(jax.devices()[0]):
        return chip.peak_flops * jax.device_count()
    # Virtual CPU devices share the same cores: what one product reaches is the whole machine's.
    return measured_matmul_flops(dtype)


@functools.cache
def measured_matmul_flops(dtype: str, size: int = 1536, repeats: int = 5) -> float:
    """Best FLOP/s of a `size`³ matrix product over `repeats` timed runs (0.3 s on two cores)."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
