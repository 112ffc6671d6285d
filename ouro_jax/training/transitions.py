"""How the parameters of one stage become those of the next: upcycling by layer duplication.

At half the loops, twice the layers, stacked, compute what the old model did, but for the final
norm that stood between the halves (paper, section 4.3.1, which leaves the order open).
"""

from typing import Any

import jax
import jax.numpy as jnp


def upcycle(tree: Any, factor: int, transition: str) -> Any:
    """Repeats the layers of every leaf under `layers` by `factor`; other leaves stay.

    `upcycle_stacked` gives 1 … N, 1 … N; `upcycle_interleaved` gives 1, 1, 2, 2, … Works on
    parameters, gradients and optimizer moments alike.
    """

    def duplicate(path, leaf):
        if not any(getattr(entry, "key", None) == "layers" for entry in path):
            return leaf
        if transition == "upcycle_stacked":
            return jnp.concatenate([leaf] * factor, axis=0)
        return jnp.repeat(leaf, factor, axis=0)

    return jax.tree_util.tree_map_with_path(duplicate, tree)
