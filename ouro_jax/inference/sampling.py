"""From logits to the next token: greedy, temperature, top-k, top-p; seeded per row.

B batch rows, V vocabulary. Everything is float32.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """How the tokens of each row are drawn. Plain numbers, traced: changing them compiles nothing.

    `temperature_B` 0 takes the most probable token; `top_k_B` 0 and `top_p_B` 1 leave every token
    in.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array


def row_key(seed: int | jax.Array, stream: int | jax.Array) -> jax.Array:
    """The key that one answer is drawn from: streams of a seed draw differently."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def row_keys(seed: int, rows: int) -> jax.Array:
    """`row_key` of the streams 0 … rows - 1."""
    return jax.vmap(row_key, (None, 0))(seed, jnp.arange(rows))


def sample(
    logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array, index_B: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B]; `index_B` counts the new tokens of its answer.

    A row draws the same whatever the other rows are and how many there are.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    drawn_B = sampling.temperature_B > 0
    limited = jnp.any(drawn_B & ((sampling.top_k_B > 0) | (sampling.top_p_B < 1)))

    def draw():
        keys = jax.vmap(jax.random.fold_in)(keys_B, index_B)
        scaled_BV = logits_BV / jnp.where(drawn_B, sampling.temperature_B, 1)[:, None]
        kept_BV = jax.lax.cond(limited, lambda: limit(scaled_BV, sampling), lambda: scaled_BV)
        return jnp.where(drawn_B, jax.vmap(jax.random.categorical)(keys, kept_BV), greedy_B)

    return jax.lax.cond(jnp.any(drawn_B), draw, lambda: greedy_B).astype(jnp.int32)


def limit(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the tokens that top-k, then top-p, leave in; -inf for the others.

    Top-k keeps the k largest. Top-p keeps, of these, the fewest whose probabilities reach p: those
    before which less than p has been collected. A token that ties with the last one kept is kept.
    """
    top_k_B1, top_p_B1 = sampling.top_k_B[:, None], sampling.top_p_B[:, None]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank_V = jnp.arange(logits_BV.shape[-1])
    in_top_k_BV = (rank_V < top_k_B1) | (top_k_B1 == 0)
    p_BV = jax.nn.softmax(jnp.where(in_top_k_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # A row without top-p keeps all: a sum of float32 may reach one before the last token.
    in_top_p_BV = (before_BV < top_p_B1) | (rank_V == 0) | (top_p_B1 >= 1)
    lowest_B1 = jnp.min(
        jnp.where(in_top_k_BV & in_top_p_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
