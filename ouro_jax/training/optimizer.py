"""AdamW with clipping, from optax, over what a stage trains."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from ouro_jax.config import GATE_OBJECTIVES, OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, learning_rate: jax.Array | float, weight_decay: jax.Array | float
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    The rate and the decay may be traced values: the curriculum's clock is tokens, not optax's
    count, and no value of theirs compiles anew. Matrices decay, norms and the gate's bias do not
    (the paper says 0.1 and not of what).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate, config.beta1, config.beta2, config.eps,
            weight_decay=weight_decay,  # pyright: ignore[reportArgumentType]
            mask=_is_matrix,
        ),
    )  # fmt: skip


def _is_matrix(params: Any) -> Any:
    def decays(path, _):
        return any(getattr(entry, "key", None) in ("kernel", "embedding") for entry in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def trained_part(params: Mapping[str, Any], objective: str) -> Mapping[str, Any]:
    """The subtree of `params` that `objective` trains: everything, or the exit gate alone.

    The optimizer state is made for this part, so what is frozen has no moments and no decay.
    """
    if objective in GATE_OBJECTIVES:
        return {"stack": {"early_exit_gate": params["stack"]["early_exit_gate"]}}
    return params


def with_trained_part(params: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """`params` with the trained subtree replaced by `part`."""
    return {**params, **part, "stack": {**params["stack"], **part["stack"]}}
