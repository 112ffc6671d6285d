"""Cross-entropy per token and loop, without ever holding more than one chunk's logits.

T loops, B batch, L sequence, C positions of a chunk, S chunks, D model width, V vocabulary.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ouro_jax.model.attention import matmul_precision


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
    Gradients with respect to states and head are exact; reverse mode only.
    """
    # Looked up here: the backward pass is traced where other rules may hold.
    axes = nn.logical_to_mesh_axes(("act_batch", "act_length", "act_vocab"))
    return _cross_entropy(states_TBLD, head_DV, targets_BL, chunk_tokens, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(states_TBLD, head_DV, targets_BL, chunk_tokens, axes):
    return _forward(states_TBLD, head_DV, targets_BL, chunk_tokens, axes)[0]


def _forward(states_TBLD, head_DV, targets_BL, chunk_tokens, axes):
    def chunk_loss(_, chunk):
        states_BCD, targets_BC = chunk
        logits_BCV = _logits(states_BCD, head_DV, axes)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return None, (normaliser_BC - target_BC, normaliser_BC)

    states_TSBCD, targets_SBC = _chunks(chunk_tokens, states_TBLD, targets_BL)
    over_chunks = functools.partial(jax.lax.scan, chunk_loss, None)
    losses_TSBC = jax.lax.map(lambda states: over_chunks((states, targets_SBC))[1], states_TSBCD)
    batch, length = targets_BL.shape
    ce_TBL, normaliser_TBL = (
        x_TSBC.swapaxes(1, 2).reshape(len(states_TBLD), batch, -1)[:, :, :length]
        for x_TSBC in losses_TSBC
    )
    return ce_TBL, (states_TBLD, head_DV, targets_BL, normaliser_TBL)


def _backward(chunk_tokens, axes, saved, dce_TBL):
    """The head's gradient is summed over loops and chunks in float32: hundreds of sums in bfloat16
    would lose most of it, and a float32 copy of the head, to be summed into, takes its memory."""
    states_TBLD, head_DV, targets_BL, normaliser_TBL = saved
    precision = matmul_precision(states_TBLD.dtype)

    def chunk_gradient(dhead_DV, chunk):
        # A barrier: targets are the same in every loop, and XLA would keep their mask, as large as
        # the logits, from loop to loop.
        states_BCD, dce_BC, normaliser_BC, targets_BC = jax.lax.optimization_barrier(chunk)
        logits_BCV = _logits(states_BCD, head_DV, axes)
        softmax_BCV = jnp.exp(logits_BCV - normaliser_BC[..., None])
        is_target_BCV = targets_BC[..., None] == jnp.arange(head_DV.shape[1])
        dlogits_BCV = (softmax_BCV - is_target_BCV) * dce_BC[..., None]
        dlogits_BCV = dlogits_BCV.astype(states_BCD.dtype)
        head = head_DV.astype(states_BCD.dtype)
        dstates_BCD = jnp.einsum("BCV,DV->BCD", dlogits_BCV, head, precision=precision)
        dhead_DV += jnp.einsum(
            "BCD,BCV->DV", states_BCD, dlogits_BCV,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return dhead_DV, dstates_BCD

    *loops_TSBC, targets_SBC = _chunks(
        chunk_tokens, states_TBLD, dce_TBL, normaliser_TBL, targets_BL
    )
    zeros_DV = jnp.zeros(head_DV.shape, jnp.float32)
    dhead_DV, dstates_TSBCD = jax.lax.scan(
        lambda dhead_DV, loop: jax.lax.scan(chunk_gradient, dhead_DV, (*loop, targets_SBC)),
        zeros_DV, tuple(loops_TSBC),
    )  # fmt: skip
    loops, batch, length, width = states_TBLD.shape
    dstates_TBLD = dstates_TSBCD.swapaxes(1, 2).reshape(loops, batch, -1, width)[:, :, :length]
    return dstates_TBLD, dhead_DV.astype(head_DV.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _logits(states_BCD: jax.Array, head_DV: jax.Array, axes: PartitionSpec) -> jax.Array:
    logits_BCV = jnp.einsum(
        "BCD,DV->BCV", states_BCD, head_DV.astype(states_BCD.dtype),
        precision=matmul_precision(states_BCD.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    if jax.sharding.get_abstract_mesh().empty:
        return logits_BCV
    return jax.lax.with_sharding_constraint(logits_BCV, axes)


def _chunks(chunk_tokens: int, states_TBLD: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays with L as [S, B, C] in place of [B, L], padded with zeros."""
    batch, length = states_TBLD.shape[1:3]
    chunk = max(1, min(length, chunk_tokens // batch))
    num_chunks = -(-length // chunk)
    # Even chunks: 257 positions in chunks of at most 128 are 3 × 86, not 2 × 128 + 1.
    chunk = -(-length // num_chunks)
    padding = num_chunks * chunk - length

    def split(array: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[axis + 1] = (0, padding)
        shape = (*array.shape[: axis + 1], num_chunks, chunk, *array.shape[axis + 2 :])
        return jnp.pad(array, widths).reshape(shape).swapaxes(axis, axis + 1)

    # Rows are the second axis of what has loops, the first of what has none.
    return [split(states_TBLD, 1), *(split(array, array.ndim - 2) for array in arrays)]
