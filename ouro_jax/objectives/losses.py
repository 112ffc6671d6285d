"""Losses over the exit distribution, as sums and counts over tokens.

Nothing here divides by the number of tokens: sums and counts are added over microbatches and
devices, and divided once per optimizer step, so packing, masks, accumulation and sharding do not
change the value.

T loops, B batch, L sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.model.exit import log_exit_distribution


class Sums(struct.PyTreeNode):
    """Sums over the counted tokens of a batch; divide by `num_tokens` for means.

    `loss` is what is minimised. `metrics` holds further sums by name; those of shape [T] are per
    loop.
    """

    loss: jax.Array
    num_tokens: jax.Array
    metrics: dict[str, jax.Array]

    def means(self) -> dict[str, jax.Array]:
        """`loss` and every metric per counted token."""
        count = jnp.maximum(self.num_tokens, 1.0)
        return {"loss": self.loss / count} | {k: v / count for k, v in self.metrics.items()}


def expected_loss(
    ce_TBL: jax.Array,
    gate_logits_TBL: jax.Array,
    loss_mask_BL: jax.Array,
    entropy_weight: jax.Array | float = 0.05,
    geometric_prior: float | None = None,
) -> Sums:
    """Stage I objective: Σ_t p_t CE_t - β H(p), per token (paper, eq. 4).

    Args:
      ce_TBL: cross-entropy of every loop, nats.
      gate_logits_TBL: float32 logits of λ.
      loss_mask_BL: tokens that count.
      entropy_weight: β. The uniform prior makes -βH the KL to it, up to the constant β log T.
      geometric_prior: λ of a geometric prior π instead (paper, Appendix A): the regulariser is
        then β KL(p ‖ π) = -βH - β Σ p log π; the last loop takes π's remainder.

    Gradients flow into the gate and into every loop's cross-entropy.
    """
    ce_TBL, gate_logits_TBL = _counted(loss_mask_BL, ce_TBL, gate_logits_TBL)
    exits = _Exits.of(ce_TBL, gate_logits_TBL)
    loss_BL = exits.expected_BL - entropy_weight * exits.entropy_BL
    if geometric_prior is not None:
        log_prior_T = geometric_log_prior(geometric_prior, ce_TBL.shape[0])
        loss_BL -= entropy_weight * jnp.einsum("TBL,T->BL", exits.pdf_TBL, log_prior_T)
    return _sums(loss_BL, ce_TBL, exits, loss_mask_BL)


def last_loop_loss(ce_TBL: jax.Array, gate_logits_TBL: jax.Array, loss_mask_BL: jax.Array) -> Sums:
    """The cross-entropy of the last loop only, as a model of fixed depth is trained."""
    ce_TBL, gate_logits_TBL = _counted(loss_mask_BL, ce_TBL, gate_logits_TBL)
    return _sums(ce_TBL[-1], ce_TBL, _Exits.of(ce_TBL, gate_logits_TBL), loss_mask_BL)


def gate_loss(
    ce_TBL: jax.Array,
    gate_logits_TBL: jax.Array,
    loss_mask_BL: jax.Array,
    steepness: float = 50.0,
    threshold: float = 0.005,
    lookahead: bool = False,
) -> Sums:
    """Stage II objective: the gate alone learns whether a loop was worth it (paper, eq. 5-6).

    The target to continue at loop t is w_t = σ(k (I_t - γ)) with the improvement
    I_t = max(0, CE_{t-1} - CE_t), k = `steepness`, γ = `threshold` in nats; the loss is the binary
    cross-entropy of 1 - λ_t against w_t, summed over t = 2 … T and divided by T, as printed.
    `lookahead` shifts the improvement by one loop: λ_t learns CE_t - CE_{t+1}, t = 1 … T-1, the
    loop that it decides about; the sum is divided by T too.

    No gradient flows into `ce_TBL`; the caller differentiates with respect to the gate only.
    """
    ce_TBL, gate_logits_TBL = _counted(loss_mask_BL, ce_TBL, gate_logits_TBL)
    ce_TBL = jax.lax.stop_gradient(ce_TBL)
    improvement = jnp.maximum(ce_TBL[:-1] - ce_TBL[1:], 0.0)
    continue_target = jax.nn.sigmoid(steepness * (improvement - threshold))
    logits = gate_logits_TBL[:-1] if lookahead else gate_logits_TBL[1:]
    stop, go_on = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    bce = -(continue_target * go_on + (1 - continue_target) * stop)
    loss_BL = jnp.sum(bce, axis=0) / ce_TBL.shape[0]
    return _sums(loss_BL, ce_TBL, _Exits.of(ce_TBL, gate_logits_TBL), loss_mask_BL)


def geometric_log_prior(parameter: float, num_loops: int) -> jax.Array:
    """log π_t of a geometric prior truncated at T: λ(1-λ)^(t-1), the last loop the remainder."""
    steps = jnp.arange(num_loops, dtype=jnp.float32)
    log_prior = jnp.log(parameter) + steps * jnp.log1p(-parameter)
    return log_prior.at[-1].set((num_loops - 1) * jnp.log1p(-parameter))


class _Exits(NamedTuple):
    """The exit distribution of each token, its expected cross-entropy and its entropy."""

    pdf_TBL: jax.Array
    expected_BL: jax.Array
    entropy_BL: jax.Array

    @classmethod
    def of(cls, ce_TBL: jax.Array, gate_logits_TBL: jax.Array) -> "_Exits":
        log_pdf_TBL = log_exit_distribution(gate_logits_TBL)
        pdf_TBL = jnp.exp(log_pdf_TBL)
        expected_BL = jnp.sum(pdf_TBL * ce_TBL, axis=0)
        return cls(pdf_TBL, expected_BL, -jnp.sum(pdf_TBL * log_pdf_TBL, axis=0))


def _counted(loss_mask_BL, *arrays_TBL) -> list[jax.Array]:
    """The arrays with zeros at masked tokens, which may hold inf or nan: times 0, those would
    still be nan, in the value and in the gradient of what they are multiplied with."""
    return [jnp.where(loss_mask_BL, array_TBL, 0.0) for array_TBL in arrays_TBL]


def _sums(loss_BL, ce_TBL, exits: _Exits, loss_mask_BL) -> Sums:
    def total(values_BL):
        return jnp.sum(jnp.where(loss_mask_BL, values_BL, 0.0), axis=(-2, -1))

    depths_T = jnp.arange(1, ce_TBL.shape[0] + 1, dtype=jnp.float32)
    metrics = {
        "loss_per_loop": total(ce_TBL),
        "exit_distribution": total(exits.pdf_TBL),
        "expected_loss": total(exits.expected_BL),
        "entropy": total(exits.entropy_BL),
        "mean_depth": total(jnp.einsum("TBL,T->BL", exits.pdf_TBL, depths_T)),
    }
    count = jnp.sum(loss_mask_BL, dtype=jnp.float32)
    return Sums(total(loss_BL), count, jax.lax.stop_gradient(metrics))
