"""Causal attention over packed rows, and over a key/value cache.

B batch, L query positions, S key positions or cache slots, H heads, G KV heads, K head width,
R = H / G query heads per KV head, Q = L · R queries of a KV head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ouro_jax.model.cache import Address, KVCache, read, write

# The fewest cache slots that are read; more are read in doublings.
SEEN_AT_LEAST = 64

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL or None) → o_BLHK; causal, scaled by K^-0.5."""


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products where float32 was asked for (TPU and GPU shorten them otherwise)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dense_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids_BL: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within each segment, all scores at once; returns o_BLHK in q's dtype.

    A position sees itself and the earlier positions of its row with its own segment id.
    Query head h reads KV head h // (H / G).
    """
    length = q_BLHK.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids_BL is not None:
        visible = visible & (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])
    return attend(q_BLHK, k_BLGK, v_BLGK, visible)


def cached_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    address: Address,
) -> tuple[jax.Array, KVCache]:
    """Writes keys and values, and attends over the cache slots up to each position.

    Only as many slots are read as `address.longest` asks for, rounded up to SEEN_AT_LEAST times a
    power of two: one program for caches of any fill.
    """
    policy, dtype = cache.policy, k_BLGK.dtype
    keys = write(cache.keys_CNRGSK, k_BLGK, policy, layer, address)
    values = write(cache.values_CNRGSK, v_BLGK, policy, layer, address)

    def over(seen):
        def attend_row(q_BLHK, keys, values, index):
            k_GSK = read(keys, policy, layer, address, index, seen, dtype)
            v_GSK = read(values, policy, layer, address, index, seen, dtype)
            visible_LS = jnp.arange(seen) <= address.positions_BL[index, :, None]
            q_1LHK = jax.lax.dynamic_index_in_dim(q_BLHK, index)
            return _attend(q_1LHK, k_GSK[None], v_GSK[None], visible_LS[None], "BGSK")[0]

        def attend_to_seen(q_BLHK, keys, values):
            # Row by row, each out of the cache: rows stand at different loops, and to put what they
            # read side by side would write and read it once more (CPU, 32 rows: 28 ms, not 15).
            attend_one = functools.partial(attend_row, q_BLHK, keys, values)
            if len(q_BLHK) == 1:
                return attend_one(0)[None]
            return jax.lax.map(attend_one, jnp.arange(len(q_BLHK)))

        return attend_to_seen

    lengths = [SEEN_AT_LEAST]
    while lengths[-1] < cache.num_slots:
        lengths.append(2 * lengths[-1])
    lengths[-1] = cache.num_slots
    index = jnp.sum(address.longest > jnp.array(lengths[:-1], jnp.int32))
    branches = [over(seen) for seen in lengths]
    o_BLHK = jax.lax.switch(index, branches, q_BLHK, keys, values)
    return o_BLHK, cache.replace(keys_CNRGSK=keys, values_CNRGSK=values)


def attend(
    q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible_BLS: jax.Array
) -> jax.Array:
    """Attention of every query to the keys that are visible to it, at least one; o_BLHK."""
    return _attend(q_BLHK, k_BSGK, v_BSGK, visible_BLS, "BSGK")


def _attend(q_BLHK, k, v, visible_BLS, axes):
    batch, length, heads, width = q_BLHK.shape
    slots, groups = k.shape[axes.index("S")], k.shape[axes.index("G")]
    precision = matmul_precision(q_BLHK.dtype)
    # Positions and query heads as one axis: with two, the gradients of keys and values contract
    # over both, and XLA for CPU transposes a copy of the scores for each. Positions come first,
    # so that they may still be split over devices.
    q_BLGRK = q_BLHK.reshape(batch, length, groups, heads // groups, width)
    q_BGQK = q_BLGRK.swapaxes(1, 2).reshape(batch, groups, -1, width)
    scores_BGQS = jnp.einsum(
        f"BGQK,{axes}->BGQS", q_BGQK, k,
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores_BGLRS = (scores_BGQS * width**-0.5).reshape(batch, groups, length, -1, slots)
    visible = visible_BLS[:, None, :, None]
    scores_BGLRS = jnp.where(visible, scores_BGLRS, jnp.finfo(jnp.float32).min)
    weights_BGLRS = jax.nn.softmax(scores_BGLRS, axis=-1).astype(q_BLHK.dtype)
    weights_BGQS = weights_BGLRS.reshape(scores_BGQS.shape)
    o_BGQK = jnp.einsum(f"BGQS,{axes}->BGQK", weights_BGQS, v, precision=precision)
    o_BLGRK = o_BGQK.reshape(batch, groups, length, -1, width).swapaxes(1, 2)
    return o_BLGRK.reshape(batch, length, heads, width)
