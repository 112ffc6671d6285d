"""Weights as int8 for inference: symmetric, one scale per output channel, through qwix.

The seven matrices of every layer and the LM head become int8 with float32 scales; embedding, norms
and exit gate keep their dtypes. I inputs and O outputs of a matrix with its axes taken together, C
inputs of a block, N layers, B rows, L tokens of a row.

The scale of a channel is its largest weight over 127.5. Plain, weights are rounded to nearest.

Calibrated, the error of a channel's output is eᵀ M e, with e the error of its weights and M the
second moments of its inputs over all loops: one weight after another is set to the number that is
best given the errors of all others, `SWEEPS` times through. Errors of weights whose inputs go
together then cancel, where rounding to nearest adds them up. No step makes the error larger, and
that counts in a looped model, whose next loop starts from what the errors have left. It is cyclic
coordinate descent, as QuantEase (arXiv:2309.01885) does it; our own code. Scales that clip, chosen
by the same error, were tried too: after the descent they gained nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.model.int8 import DTYPE, LAYER_MATRICES, SCALE, is_quantised
from ouro_jax.model.moments import HEAD, collect_moments

METHODS = ("int8",)
SWEEPS = 4
BLOCK = 128
# Of the mean second moment, added to each: directions that no calibration token took still count.
DAMPING = 0.2
_FEWEST_TOKENS, _ROW_TOKENS, _MOST_ROWS = 128, 512, 64


def quantize(
    config: ModelConfig, params: dict[str, Any], calibration_BL: np.ndarray | None = None
) -> dict[str, Any]:
    """The parameters with int8 kernels and a `kernel_scale` beside each; the rest is shared.

    `calibration_BL` are token ids [B, L] of text like that which the model will see; without them
    the rounding is plain. Raises ConfigError if qwix is not installed or a kernel is int8 already.
    """
    _qwix()
    if is_quantised(params):
        raise ConfigError("The model is int8 already: expected the float model it was made from.")
    moments = None if calibration_BL is None else collect_moments(config, params, calibration_BL)
    layers = dict(params["stack"]["layers"])
    for module, summed in LAYER_MATRICES.items():
        part, name = module
        pairs = [
            _quantize_kernel(kernel, summed, moments and moments.of(layer, module))
            for layer, kernel in enumerate(layers[part][name]["kernel"])
        ]
        pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
        layers[part] = {**layers[part], name: pair}
    head = _quantize_kernel(params["lm_head"]["kernel"], 1, moments and moments.of(0, HEAD))
    return {**params, "stack": {**params["stack"], "layers": layers}, "lm_head": head}


def calibration_rows(config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """Token ids as rows [B, L] for `quantize`: the first 64 rows of at most 512 tokens.

    L is no more than the model's window; what does not fill a row is left out. Raises ConfigError
    for fewer than 128 tokens, from which no second moments can be told.
    """
    if len(ids) < _FEWEST_TOKENS:
        raise ConfigError(
            f"The calibration text has {len(ids):,} tokens: expected at least {_FEWEST_TOKENS}, "
            "better 30,000, of text like that which the model will see."
        )
    length = min(_ROW_TOKENS, config.max_position_embeddings, len(ids))
    rows = min(_MOST_ROWS, len(ids) // length)
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def _quantize_kernel(
    kernel: jax.Array, summed: int, moments_II: jax.Array | None
) -> dict[str, jax.Array]:
    """The pair of one kernel, whose first `summed` axes are inputs and whose others outputs."""
    shape = kernel.shape
    weights_IO = kernel.reshape(math.prod(shape[:summed]), -1).astype(jnp.float32)
    if moments_II is None:
        quantised_IO, scale_O = _round(weights_IO)
    else:
        quantised_IO, scale_O = _calibrated(weights_IO, moments_II)
    return {"kernel": quantised_IO.reshape(shape), SCALE: scale_O.reshape(shape[summed:])}


def _round(weights_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The int8 numbers nearest to the weights, and the scale of every channel."""
    pair = _qwix().quantize(weights_IO, DTYPE, channelwise_axes=(1,), calibration_method="absmax")
    return pair.qvalue, pair.scale[0]


@jax.jit
def _calibrated(weights_IO: jax.Array, moments_II: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers that make eᵀ M e small, with the scales of plain rounding."""
    diagonal_I = jnp.diagonal(moments_II)
    # All-zero moments, of inputs that are always zero, would otherwise be divided by.
    damping = jnp.maximum(DAMPING * diagonal_I.mean(), jnp.finfo(jnp.float32).tiny)
    moments_II = moments_II + damping * jnp.eye(len(diagonal_I))
    quantised_IO, scale_O = _round(weights_IO)
    with jax.default_matmul_precision("highest"):
        errors_IO = _descend(weights_IO, weights_IO - quantised_IO * scale_O, scale_O, moments_II)
    return jnp.round((weights_IO - errors_IO) / scale_O).astype(DTYPE), scale_O


def _descend(weights_IO, errors_IO, scale_O, moments_II):
    """The errors after `SWEEPS` sweeps of coordinate descent on eᵀ M e over the int8 numbers.

    M e is kept up to date: within a block for every weight, for the others once a block, as one
    product.
    """
    width = math.gcd(len(weights_IO), BLOCK)
    limits = jnp.iinfo(DTYPE)

    def visit_block(index, carry):
        errors_IO, pull_IO = carry
        start = index * width

        def block(array, axis=0):
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis)

        columns_IC = block(moments_II, axis=1)
        moments_CC, weights_CO, before_CO = block(columns_IC), block(weights_IO), block(errors_IO)

        def visit_weight(c, carry):
            errors_CO, pull_CO = carry
            wanted_O = errors_CO[c] - pull_CO[c] / moments_CC[c, c]
            steps_O = jnp.round((weights_CO[c] - wanted_O) / scale_O)
            error_O = weights_CO[c] - scale_O * jnp.clip(steps_O, limits.min, limits.max)
            pull_CO = pull_CO + moments_CC[:, c, None] * (error_O - errors_CO[c])
            return errors_CO.at[c].set(error_O), pull_CO

        after_CO, _ = jax.lax.fori_loop(0, width, visit_weight, (before_CO, block(pull_IO)))
        pull_IO = pull_IO + columns_IC @ (after_CO - before_CO)
        return jax.lax.dynamic_update_slice_in_dim(errors_IO, after_CO, start, 0), pull_IO

    blocks = len(weights_IO) // width

    def visit(index, carry):
        return visit_block(index % blocks, carry)

    carry = errors_IO, moments_II @ errors_IO
    return jax.lax.fori_loop(0, SWEEPS * blocks, visit, carry)[0]


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            "int8 weights are made with qwix, which is not installed: pip install "
            "'ouro_jax[quantize]'."
        ) from error
    return qwix
