"""A step computed twice and compared bit for bit, against devices that compute wrongly."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ouro_jax.config import GuardConfig
from ouro_jax.data.batch import Batch
from ouro_jax.training.checkpoints import Position
from ouro_jax.training.recovery import Unsound
from ouro_jax.training.state import TrainState
from ouro_jax.training.state_checks import differing, state_sums


def is_repeated(guard: GuardConfig, step: int) -> bool:
    """Whether this step is one of those."""
    return bool(guard.repeat_every_steps) and step % guard.repeat_every_steps == 0


def step_twice(
    step: Any, mesh: Mesh, state: TrainState, batch: Batch, inputs: Any, before: Position
) -> tuple[TrainState, Any]:
    """What `step` makes of `state`, if it makes the same of a copy.

    For that moment there are two states. Raises Unsound, naming the arrays and devices that
    differ: those of a first product that went wrong are usually few, and the devices tell where.
    """
    copy = jax.tree.map(jnp.copy, state)
    first, _ = step(copy, batch, inputs)
    first_sums = state_sums(first, mesh)
    del copy, first
    state, metrics = step(state, batch, inputs)
    if found := differing(state, first_sums, state_sums(state, mesh), mesh):
        raise Unsound(
            f"step {before.step + 1:,} computed twice differs in {len(found)} arrays, first "
            f"{found[0]}", before, by_machine=True,
        )  # fmt: skip
    return state, metrics
