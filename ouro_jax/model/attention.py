"""Causal attention over packed rows, and over a key/value cache.

B batch, L query positions, S key positions or cache slots, H heads, G KV heads, K head width,
R = H / G query heads per KV head, Q = L · R queries of a KV head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    q_BLHK: jax.Array, keys_BSGK: jax.Array, values_BSGK: jax.Array, positions_BL: jax.Array
) -> jax.Array:
    """Attention of the queries at `positions_BL` over the cache slots up to their own."""
    slots_S = jnp.arange(keys_BSGK.shape[1])
    visible_BLS = slots_S <= positions_BL[:, :, None]
    return attend(q_BLHK, keys_BSGK, values_BSGK, visible_BLS)


def attend(
    q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible_BLS: jax.Array
) -> jax.Array:
    """Attention of every query to the keys that are visible to it, at least one; o_BLHK."""
    batch, length, heads, width = q_BLHK.shape
    slots, groups = k_BSGK.shape[1:3]
    precision = matmul_precision(q_BLHK.dtype)
    # Positions and query heads as one axis: with two, the gradients of keys and values contract
    # over both, and XLA for CPU transposes a copy of the scores for each. Positions come first,
    # so that they may still be split over devices.
    q_BLGRK = q_BLHK.reshape(batch, length, groups, heads // groups, width)
    q_BGQK = q_BLGRK.swapaxes(1, 2).reshape(batch, groups, -1, width)
    scores_BGQS = jnp.einsum(
        "BGQK,BSGK->BGQS", q_BGQK, k_BSGK,
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores_BGLRS = (scores_BGQS * width**-0.5).reshape(batch, groups, length, -1, slots)
    visible = visible_BLS[:, None, :, None]
    scores_BGLRS = jnp.where(visible, scores_BGLRS, jnp.finfo(jnp.float32).min)
    weights_BGLRS = jax.nn.softmax(scores_BGLRS, axis=-1).astype(q_BLHK.dtype)
    weights_BGQS = weights_BGLRS.reshape(scores_BGQS.shape)
    o_BGQK = jnp.einsum("BGQS,BSGK->BGQK", weights_BGQS, v_BSGK, precision=precision)
    o_BLGRK = o_BGQK.reshape(batch, groups, length, -1, width).swapaxes(1, 2)
    return o_BLGRK.reshape(batch, length, heads, width)
