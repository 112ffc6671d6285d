"""Second moments of what the quantised matrices are multiplied with, over all loops.

B batch, L sequence, D model width, T loops, I inputs of a matrix (D; H · K heads times head width
for the attention's output; F MLP width for the MLP's).
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.model.attention import dense_attention, matmul_precision
from ouro_jax.model.int8 import LAYER_MATRICES
from ouro_jax.model.layers import Layer, RMSNorm, rotary_angles
from ouro_jax.model.loop_lm import LoopLM

# Of the matrices that read the same input, one is watched.
_SAME_INPUT: dict[tuple[str, ...], tuple[str, ...]] = {
    ("self_attn", "k_proj"): ("self_attn", "q_proj"),
    ("self_attn", "v_proj"): ("self_attn", "q_proj"),
    ("mlp", "up_proj"): ("mlp", "gate_proj"),
}
HEAD = ("lm_head",)
_WATCHED = frozenset(LAYER_MATRICES) - frozenset(_SAME_INPUT)


class Moments:
    """E[x xᵀ] of every matrix's input: `of(layer, module)`, float32 [I, I], a mean over tokens.

    What the loops feed a matrix is pooled: its one set of weights has to serve them all. Memory
    is that of 2 D² + (H K)² + F² float32 a layer (177 MB for the 1.4B model).
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, tuple[str, ...]], jax.Array] = {}
        self._tokens = 0

    def of(self, layer: int, module: tuple[str, ...]) -> jax.Array:
        """The moments of one matrix; `layer` counts from 0 and is ignored for `HEAD`."""
        key = (0, HEAD) if module == HEAD else (layer, _SAME_INPUT.get(module, module))
        return self._sums[key] / self._tokens

    def add(self, layer: int, module: tuple[str, ...], sum_II: jax.Array) -> None:
        """Adds Σ x xᵀ of a batch in one loop."""
        past = self._sums.get((layer, module))
        self._sums[layer, module] = sum_II if past is None else past + sum_II

    def count(self, tokens: int) -> None:
        """Says that `tokens` more went through one loop."""
        self._tokens += tokens


def collect_moments(
    config: ModelConfig, params: dict[str, Any], tokens_BL: np.ndarray, batch: int = 8
) -> Moments:
    """The moments over all positions of `tokens_BL` and all `config.num_loops` loops.

    `params` are those of a float model; they are cast to the compute dtype a layer at a time.
    Rows go through the model `batch` at a time.
    """
    moments = Moments()
    for start in range(0, len(tokens_BL), batch):
        rows_BL = jnp.asarray(tokens_BL[start : start + batch])
        x_BLD = cast(jax.Array, LoopLM(config).apply({"params": params}, rows_BL, method="embed"))
        for _ in range(config.num_loops):
            for index in range(config.num_layers):
                x_BLD, sums = _layer_step(config, params["stack"]["layers"], index, x_BLD)
                for module, sum_II in sums.items():
                    moments.add(index, tuple(module.split("/")), sum_II)
            x_BLD, sum_DD = _final_norm(config, params["stack"]["norm"], x_BLD)
            moments.add(0, HEAD, sum_DD)
            moments.count(rows_BL.size)
    return moments


@functools.partial(jax.jit, static_argnums=0)
def _layer_step(config: ModelConfig, layers: dict[str, Any], index: jax.Array, x_BLD: jax.Array):
    """One layer alone, outside the scan, in which its inner arrays could not be handed out."""
    params = jax.tree.map(lambda leaf: leaf[index], layers)
    positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
    rotary = rotary_angles(positions_BL, config.head_dim, config.rope_theta)
    sums: dict[str, jax.Array] = {}

    def watch(call, arguments, keywords, context):
        path = context.module.path
        if path in _WATCHED:
            sums["/".join(path)] = _outer(arguments[0])
        return call(*arguments, **keywords)

    layer = Layer(config, dense_attention)
    with nn.intercept_methods(watch):
        out = layer.apply({"params": params}, (x_BLD, None), index, rotary, None, None)
    (x_BLD, _), _ = cast(Any, out)
    return x_BLD, sums


@functools.partial(jax.jit, static_argnums=0)
def _final_norm(config: ModelConfig, params: dict[str, Any], x_BLD: jax.Array):
    x_BLD = cast(jax.Array, RMSNorm(config.norm_eps).apply({"params": params}, x_BLD))
    return x_BLD, _outer(x_BLD)


def _outer(x: jax.Array) -> jax.Array:
    """Σ x xᵀ over batch and positions, the other axes taken as one: float32 [I, I]."""
    x_NI = x.reshape(x.shape[0] * x.shape[1], -1)
    return jnp.einsum(
        "NI,NJ->IJ", x_NI, x_NI,
        precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
