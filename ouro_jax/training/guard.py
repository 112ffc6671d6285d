"""The judgement inside the compiled step: what may reach the parameters.

A step is taken if its loss and gradient norm are finite, if neither is a spike, and if it is the
one that follows the state. Otherwise the state stays as it was, bit for bit. The last rule lets
the host learn of a refused step one step late: what it had sent off by then is refused too.

W steps of the window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Accepted steps that a spike is measured against, and how many of them there must be.
WINDOW = 128
LEAST = 32
# Standard deviations of a normal distribution per median absolute deviation.
NORMAL = 1.4826
# A loss that stands still has no deviation to speak of: one of 1 % of the median is assumed.
LEAST_DEVIATION = 0.01


class GuardState(NamedTuple):
    """Loss and gradient norm of the last accepted steps of a stage, the newest last; NaN before."""

    losses_W: jax.Array
    grad_norms_W: jax.Array


class Verdict(NamedTuple):
    """Whether a step is taken, and how far above the median it lies, in robust deviations.

    The deviations are NaN until `LEAST` steps have been accepted, and where a value is not finite.
    """

    accepted: jax.Array
    loss_deviations: jax.Array
    grad_norm_deviations: jax.Array


def fresh_guard() -> GuardState:
    """Of a stage that begins: nothing has been seen."""
    nothing = jnp.full(WINDOW, jnp.nan, jnp.float32)
    return GuardState(nothing, nothing)


def judge(
    guard: GuardState, loss: jax.Array, grad_norm: jax.Array, spike_deviations: Any
) -> tuple[Verdict, GuardState]:
    """The verdict on a step, and the guard after it if it is accepted.

    Median and median absolute deviation, and not mean and variance: a spike that was let through,
    or the fall of the loss at the start of a stage, would hide the next one.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    deviations = _deviations(guard.losses_W, loss), _deviations(guard.grad_norms_W, grad_norm)
    is_spike = jnp.zeros((), bool)
    for deviation in deviations:
        is_spike |= deviation > spike_deviations  # False for NaN
    after = GuardState(*(
        jnp.roll(seen_W, -1).at[-1].set(value)
        for seen_W, value in zip(guard, (loss, grad_norm), strict=True)
    ))  # fmt: skip
    return Verdict(finite & ~is_spike, *deviations), after


def _deviations(seen_W: jax.Array, value: jax.Array) -> jax.Array:
    median = jnp.nanmedian(seen_W)
    deviation = NORMAL * jnp.nanmedian(jnp.abs(seen_W - median))
    deviation = jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(median))
    enough = jnp.sum(jnp.isfinite(seen_W)) >= LEAST
    return jnp.where(enough & jnp.isfinite(value), (value - median) / deviation, jnp.nan)
