"""Cross-entropy per token and loop, without ever holding more than one chunk's logits.

T loops, B batch, L sequence, C positions of a chunk, D model width, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ouro_jax.model.layers import project


def cross_entropy(
    states_TBLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    chunk_tokens: int = 1024,
) -> jax.Array:
    """-log softmax(states · head)[target], float32 nats, shape [T, B, L].

    A scan over loops and chunks of positions computes B × C ≤ `chunk_tokens` rows of logits
    (C at least 1) and forgets them; the backward pass computes them again. Equation 4 weighs the
    loss of every token and loop by the gate, so it needs these values and not their mean.
    Gradients with respect to states and head are exact.
    """
    loops, batch, length, width = states_TBLD.shape
    chunk = max(1, min(length, chunk_tokens // batch))
    num_chunks = -(-length // chunk)
    # Even chunks: 257 positions in chunks of at most 128 are 3 × 86, not 2 × 128 + 1.
    chunk = -(-length // num_chunks)
    padding = num_chunks * chunk - length
    states = jnp.pad(states_TBLD, ((0, 0), (0, 0), (0, padding), (0, 0)))
    states = states.reshape(loops, batch, num_chunks, chunk, width).swapaxes(1, 2)
    targets_BL = jnp.pad(targets_BL, ((0, 0), (0, padding)))
    targets_SBC = targets_BL.reshape(batch, num_chunks, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_loss(states_BCD, targets_BC):
        # Cast here and not once outside, so that the head's gradient is summed over the chunks in
        # the head's own dtype: hundreds of sums in bfloat16 would lose most of it.
        head = head_DV.astype(states_BCD.dtype)
        logits_BCV = project("BCD,DV->BCV", states_BCD, head, jnp.float32)
        axes = ("act_batch", "act_length", "act_vocab")
        logits_BCV = nn.with_logical_constraint(logits_BCV, axes)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC

    def over_chunks(_, states_SBCD):
        return None, jax.lax.map(lambda pair: chunk_loss(*pair), (states_SBCD, targets_SBC))

    _, ce_TSBC = jax.lax.scan(over_chunks, None, states)
    return ce_TSBC.swapaxes(1, 2).reshape(loops, batch, num_chunks * chunk)[:, :, :length]
