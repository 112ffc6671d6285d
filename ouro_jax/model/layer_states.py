"""The residual stream after every layer of every loop, for probes; apart from the model's program.

T loops, N layers, B batch, L sequence, D model width.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from ouro_jax.config import ModelConfig
from ouro_jax.model.attention import dense_attention
from ouro_jax.model.layers import Layer, RMSNorm, rotary_angles
from ouro_jax.model.loop_lm import LoopLM


@functools.partial(jax.jit, static_argnames=("config", "num_loops"))
def layer_states(
    config: ModelConfig,
    params: dict[str, Any],
    tokens_BL: jax.Array,
    last_B: jax.Array,
    num_loops: int,
) -> tuple[jax.Array, jax.Array]:
    """States of one position of each row: after every layer [T, N, B, D], and the loops' [T, B, D].

    The first are the residual stream, in the compute dtype; the second are normed, as
    `LoopOutput.states_TBLD` has them. `last_B` is the position in each row; tokens after it are
    seen by none of what is returned, so rows may be padded on the right. `params` has its layers
    stacked.
    """
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    rotary = rotary_angles(positions_BL, config.head_dim, config.rope_theta)
    rows_B = jnp.arange(len(tokens_BL))
    stack = params["stack"]
    layer = Layer(config, dense_attention)
    norm = RMSNorm(config.norm_eps)

    def run_layer(x_BLD, layer_params):
        out = layer.apply({"params": layer_params}, (x_BLD, None), 0, rotary, None, None)
        (x_BLD, _), _ = cast(Any, out)
        return x_BLD, x_BLD[rows_B, last_B]

    def run_loop(x_BLD, _):
        x_BLD, layers_NBD = jax.lax.scan(run_layer, x_BLD, stack["layers"])
        x_BLD = cast(jax.Array, norm.apply({"params": stack["norm"]}, x_BLD))
        return x_BLD, (layers_NBD, x_BLD[rows_B, last_B])

    x_BLD = cast(jax.Array, LoopLM(config).apply({"params": params}, tokens_BL, method="embed"))
    return jax.lax.scan(run_loop, x_BLD, length=num_loops)[1]
