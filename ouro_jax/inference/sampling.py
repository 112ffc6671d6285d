"""From logits to the next token: greedy, temperature, top-k, top-p; seeded per row.

B batch rows, V vocabulary. Everything is float32.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """How tokens are drawn. Plain numbers, traced: changing them compiles nothing anew.

    `temperature` 0 takes the most probable token; `top_k` 0 and `top_p` 1 leave every token in.
    """

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float


def row_keys(seed: int, batch: int) -> jax.Array:
    """A key for each row, from its index alone: row 0 draws the same whatever the batch holds."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def sample(
    logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array, step: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B]; `step` counts the new tokens of the answer."""
    logits_BV = logits_BV.astype(jnp.float32)

    def greedy():
        return jnp.argmax(logits_BV, axis=-1)

    def draw():
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        scaled_BV = logits_BV / sampling.temperature
        unlimited = (sampling.top_k == 0) & (sampling.top_p == 1)
        kept_BV = jax.lax.cond(unlimited, lambda: scaled_BV, lambda: limit(scaled_BV, sampling))
        return jax.vmap(jax.random.categorical)(keys, kept_BV)

    return jax.lax.cond(sampling.temperature == 0, greedy, draw).astype(jnp.int32)


def limit(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the tokens that top-k, then top-p, leave in; -inf for the others.

    Top-k keeps the k largest. Top-p keeps, of these, the fewest whose probabilities reach p: those
    before which less than p has been collected. A token that ties with the last one kept is kept.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank_V = jnp.arange(logits_BV.shape[-1])
    in_top_k_V = (rank_V < sampling.top_k) | (sampling.top_k == 0)
    p_BV = jax.nn.softmax(jnp.where(in_top_k_V, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    in_top_p_BV = (before_BV < sampling.top_p) | (rank_V == 0)
    lowest_B1 = jnp.min(
        jnp.where(in_top_k_V & in_top_p_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
