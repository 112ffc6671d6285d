"""What the devices at hand can do at most, and how much of their memory is taken."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ouro_jax.parallel.chips import chip_of


class Peak(NamedTuple):
    """The denominator of MFU: FLOP/s of all devices together, and where the figure is from."""

    flops: float
    source: str

    def mfu(self, flops: float) -> float:
        """FLOP/s that the model needs (analytic, `model/flops.py`), in % of this peak."""
        return 100 * flops / self.flops


def peak_flops(dtype: str) -> Peak:
    """The chip's data sheet (dense bfloat16), or a matrix product in `dtype` timed here and now."""
    device = jax.devices()[0]
    if chip := chip_of(device):
        return Peak(chip.peak_flops * jax.device_count(), f"{chip.name} data sheet")
    # Virtual CPU devices share the same cores: what one product reaches is the whole machine's.
    devices = 1 if device.platform == "cpu" else jax.device_count()
    return Peak(measured_matmul_flops(dtype) * devices, f"measured {dtype} matmul")


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


def memory_use() -> dict[str, int | None]:
    """Bytes of this process's first device: in use now, at most so far, and the limit.

    None where the backend keeps no such count: on CPU.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {f"hbm_bytes_{name}": stats.get(key) for name, key in names.items()}
