"""The key/value cache: an ordinary value, carried through the loops and updated in place.

T loops, N layers, B batch, S cache slots, G KV heads, K head width, L new positions.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from ouro_jax.config import ModelConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every (loop, layer): loop t of a token attends to what loop t wrote.

    A slot holds all heads next to each other, so that a token's keys are one contiguous write.
    The arrays hold the bits of the numbers (uint16 for bfloat16): XLA for CPU has no update of a
    bfloat16 slice and would turn the whole cache into float32 and back for each (8 times slower).
    """

    keys_TNBSGK: jax.Array
    values_TNBSGK: jax.Array

    @property
    def num_slots(self) -> int:
        """Positions that fit into the cache."""
        return self.keys_TNBSGK.shape[3]


def empty_cache(config: ModelConfig, batch: int, num_slots: int, num_loops: int) -> KVCache:
    """A cache of zeros for the compute dtype: 2·T·N·B·S·G·K elements."""
    shape = (
        num_loops, config.num_layers, batch, num_slots, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    bits = jnp.dtype(f"uint{8 * jnp.dtype(config.dtype).itemsize}")
    return KVCache(jnp.zeros(shape, bits), jnp.zeros(shape, bits))


def write_and_read(
    cache_TNBSGK: jax.Array,
    new_BLGK: jax.Array,
    loop: jax.Array,
    layer: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Writes `new_BLGK` at (loop, layer, row, positions_BL); returns the cache and its BSGK slot.

    The positions of a row follow each other, so a row is one slice; a loop over the rows keeps
    every write a dynamic_update_slice, which XLA does in place. What is read has its layout pinned:
    XLA for TPU otherwise carries the layout that the attention products like back to the cache, and
    copies all of it there and back for every token (v5e: 3 GiB of temporaries for a 3 GiB cache).
    """
    new_bits_BLGK = jax.lax.bitcast_convert_type(new_BLGK, cache_TNBSGK.dtype)

    def write_row(row, cache):
        start = (loop, layer, row, positions_BL[row, 0], 0, 0)
        update = jax.lax.dynamic_index_in_dim(new_bits_BLGK, row, keepdims=True)
        return jax.lax.dynamic_update_slice(cache, update[None, None], start)

    cache_TNBSGK = jax.lax.fori_loop(0, new_BLGK.shape[0], write_row, cache_TNBSGK)
    slot = jax.lax.dynamic_slice(
        cache_TNBSGK, (loop, layer, 0, 0, 0, 0), (1, 1, *cache_TNBSGK.shape[2:])
    )
    slot_BSGK = with_layout_constraint(slot[0, 0], Layout((0, 1, 2, 3)))
    return cache_TNBSGK, jax.lax.bitcast_convert_type(slot_BSGK, new_BLGK.dtype)
