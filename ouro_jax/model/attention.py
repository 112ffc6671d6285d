"""Causal attention over packed rows, and over a key/value cache.

B batch, L query positions, S key positions or cache slots, H heads, G KV heads, K head width,
R = H / G query heads per KV head.
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
    return _attend(q_BLHK, k_BLGK, v_BLGK, visible)


def cached_attention(
    q_BLHK: jax.Array, keys_BSGK: jax.Array, values_BSGK: jax.Array, positions_BL: jax.Array
) -> jax.Array:
    """Attention of the queries at `positions_BL` over the cache slots up to their own."""
    slots_S = jnp.arange(keys_BSGK.shape[1])
    visible_BLS = slots_S <= positions_BL[:, :, None]
    return _attend(q_BLHK, keys_BSGK, values_BSGK, visible_BLS)


def _attend(q_BLHK, k_BSGK, v_BSGK, visible_BLS):
    batch, length, heads, width = q_BLHK.shape
    groups = k_BSGK.shape[2]
    precision = matmul_precision(q_BLHK.dtype)
    q_BLGRK = q_BLHK.reshape(batch, length, groups, heads // groups, width)
    scores_BGRLS = jnp.einsum(
        "BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK,
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores_BGRLS = scores_BGRLS * width**-0.5
    visible = visible_BLS[:, None, None]
    scores_BGRLS = jnp.where(visible, scores_BGRLS, jnp.finfo(jnp.float32).min)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1).astype(q_BLHK.dtype)
    o_BLGRK = jnp.einsum("BGRLS,BSGK->BLGRK", weights_BGRLS, v_BSGK, precision=precision)
    return o_BLGRK.reshape(batch, length, heads, width)
