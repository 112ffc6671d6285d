"""Kernels held as int8: what a quantised parameter tree looks like, and how a module reads it.

A quantised kernel is a pair beside each other in the tree: `kernel`, int8, and `kernel_scale`,
float32, one number for every output channel, so that the weight is kernel × scale. The scale does
not depend on the axes that a product sums over, so it is applied to the result: what memory holds
and a product reads is one byte a weight. Float trees have no `kernel_scale` and nothing changes
for them.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Not `scale`: the norms' weights have that name.
SCALE = "kernel_scale"
DTYPE = jnp.int8

# The quantised matrices of a layer by module, and the number of axes at the front of each kernel
# that its product sums over.
LAYER_MATRICES: Mapping[tuple[str, ...], int] = {
    ("self_attn", "q_proj"): 1,
    ("self_attn", "k_proj"): 1,
    ("self_attn", "v_proj"): 1,
    ("self_attn", "o_proj"): 2,
    ("mlp", "gate_proj"): 1,
    ("mlp", "up_proj"): 1,
    ("mlp", "down_proj"): 1,
}


def is_quantised(params: Any) -> bool:
    """Whether any kernel of a parameter tree, plain or abstract, is int8."""
    return any(leaf.dtype == DTYPE for leaf in jax.tree.leaves(params))


def scale_of(module: nn.Module, kernel: jax.Array) -> jax.Array | None:
    """The scale beside `module`'s kernel, float32 [output axes]; None for a float kernel.

    Raises ValueError for an int8 kernel without a scale: its numbers mean nothing.
    """
    if kernel.dtype != DTYPE:
        return None
    if not module.has_variable("params", SCALE):
        raise ValueError(
            f"{'/'.join(module.path)}: the kernel is int8 and there is no {SCALE} beside it."
        )
    return module.get_variable("params", SCALE)
