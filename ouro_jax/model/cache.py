"""The key/value cache: an ordinary value, carried through the loops and updated in place.

T loops, N layers, B batch, G KV heads, S cache slots, K head width, L new positions.
"""

import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every (loop, layer): loop t of a token attends to what loop t wrote.

    Slots lie next to each other within a head, so that attention reads them without a transpose.
    """

    keys_TNBGSK: jax.Array
    values_TNBGSK: jax.Array

    @property
    def num_slots(self) -> int:
        """Positions that fit into the cache."""
        return self.keys_TNBGSK.shape[4]


def empty_cache(config: ModelConfig, batch: int, num_slots: int, num_loops: int) -> KVCache:
    """A cache of zeros in the compute dtype: 2·T·N·B·G·S·K elements."""
    shape = (
        num_loops, config.num_layers, batch, config.num_kv_heads, num_slots, config.head_dim,
    )  # fmt: skip
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write_and_read(
    cache_TNBGSK: jax.Array,
    new_BLGK: jax.Array,
    loop: jax.Array,
    layer: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Writes `new_BLGK` at (loop, layer, row, positions_BL); returns the cache and its BGSK slot.

    The positions of a row follow each other, so a row is one slice; a loop over the rows keeps
    every write a dynamic_update_slice, which XLA does in place.
    """
    new_BGLK = new_BLGK.swapaxes(1, 2).astype(cache_TNBGSK.dtype)

    def write_row(row, cache):
        start = (loop, layer, row, 0, positions_BL[row, 0], 0)
        update = jax.lax.dynamic_index_in_dim(new_BGLK, row, keepdims=True)
        return jax.lax.dynamic_update_slice(cache, update[None, None], start)

    cache_TNBGSK = jax.lax.fori_loop(0, new_BGLK.shape[0], write_row, cache_TNBGSK)
    slot = jax.lax.dynamic_slice(
        cache_TNBGSK, (loop, layer, 0, 0, 0, 0), (1, 1, *cache_TNBGSK.shape[2:])
    )
    return cache_TNBGSK, slot[0, 0]
