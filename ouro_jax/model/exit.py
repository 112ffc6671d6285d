"""After which loop is a token read out: the exit distribution and the exit rules.

Shape suffixes: T loops, B batch, L sequence, D model width, V vocabulary. The functions take any
trailing shape in place of B and L. Depths that users write and read are 1-based loop counts;
exit steps in arrays are 0-based loop indices. All decisions are made in float32.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ouro_jax.errors import ConfigError, nearest

EXIT_RULES = {
    "static": "a whole number of loops, at least 1, as in static:2",
    "q": "a probability from 0 to 1, as in q:0.8",
    "hidden": "a distance greater than 0, as in hidden:0.05",
    "confidence": "a probability from 0 to 1, as in confidence:0.9",
    "lookahead": "a probability from 0 to 1, as in lookahead:0.8",
}


@dataclass(frozen=True)
class ExitRule:
    """An exit rule as the user wrote it: `kind` is a key of `EXIT_RULES`, `value` its number."""

    kind: str
    value: float


def parse_exit_rule(text: str) -> ExitRule:
    """Reads `static:2`, `q:0.8`, `hidden:0.05`, `confidence:0.9` or `lookahead:0.8`.

    Raises ConfigError, naming --exit, for an unknown kind or a number outside the kind's range.
    """
    kind, _, number = text.partition(":")
    if kind not in EXIT_RULES:
        raise ConfigError(
            f"--exit={text!r}: unknown exit rule {kind!r}. Expected KIND:VALUE with KIND one of "
            f"{', '.join(EXIT_RULES)}.{nearest(kind, EXIT_RULES)}"
        )
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    valid = {
        "static": value >= 1 and value.is_integer(),
        "q": 0 <= value <= 1,
        "hidden": 0 < value < math.inf,
        "confidence": 0 <= value <= 1,
        "lookahead": 0 <= value <= 1,
    }
    if not valid[kind]:
        raise ConfigError(f"--exit={text!r}: {kind} takes {EXIT_RULES[kind]}.")
    return ExitRule(kind, value)


def log_exit_distribution(gate_logits_TBL: jax.Array) -> jax.Array:
    """ln p(exit at loop t), float32, same shape (paper, section 3).

    p_t = λ_t ∏_{j<t} (1 - λ_j) with λ = sigmoid(gate logit); the last loop takes the whole
    remainder, so its own gate logit has no effect. Sums of log-sigmoids: values and gradients
    stay finite where λ rounds to 0 or 1 (gate logits of ±100).
    """
    log_remaining_TBL = _log_remaining(gate_logits_TBL)
    certain_BL = jnp.zeros_like(log_remaining_TBL[:1])
    log_before_TBL = jnp.concatenate([certain_BL, log_remaining_TBL[:-1]])
    log_halt_TBL = jax.nn.log_sigmoid(gate_logits_TBL[:-1].astype(jnp.float32))
    return log_before_TBL + jnp.concatenate([log_halt_TBL, certain_BL])


def exit_distribution(gate_logits_TBL: jax.Array) -> jax.Array:
    """p(exit at loop t), float32, same shape; sums to one over the loops (paper, section 3)."""
    return jnp.exp(log_exit_distribution(gate_logits_TBL))


def static_exit(gate_logits_TBL: jax.Array, depth: int) -> jax.Array:
    """Every token exits after `depth` loops (1-based). Returns step_BL int32.

    Raises ConfigError if fewer than `depth` loops are run.
    """
    loops = gate_logits_TBL.shape[0]
    if not 1 <= depth <= loops:
        raise ConfigError(f"--exit=static:{depth}: expected a depth from 1 to {loops} loops.")
    return jnp.full(gate_logits_TBL.shape[1:], depth - 1, jnp.int32)


def q_exit(
    gate_logits_TBL: jax.Array,
    q: float | jax.Array,
    published_rounding: DTypeLike | None = None,
) -> jax.Array:
    """The first loop at which the cumulative exit probability reaches `q` (paper, Q-exit).

    `q` is a number or an array that broadcasts against B, L. Returns step_BL int32, 0-based.
    Decided in float32; q >= 1 means the last loop.

    `published_rounding` names the dtype (float32 or bfloat16) of the published code's activations
    and reproduces its decisions: there the cumulative sum is rounded to that dtype, so that at
    q = 1 a token leaves early as soon as the sum rounds to one (bfloat16: gate logits of 8).
    """
    if published_rounding is not None:
        cdf_TBL = _published_cdf(gate_logits_TBL, published_rounding)
        return _first(cdf_TBL >= _rounded(jnp.asarray(q, jnp.float32), published_rounding))
    q = jnp.asarray(q, jnp.float32)
    cdf_TBL = -jnp.expm1(_log_remaining(gate_logits_TBL))
    return _first((cdf_TBL >= q) & (q < 1))


def lookahead_exit(gate_logits_TBL: jax.Array, q: float | jax.Array) -> jax.Array:
    """Q-exit decided one loop ahead: whether a token leaves after loop t is known before it.

    The cumulative probability at loop t is foretold from the gates up to loop t - 1, the last of
    them standing in for gate t, so a token leaves at the second loop at the earliest. A scheduler
    need not wait for a loop to know who is left. Returns step_BL int32, 0-based; q >= 1 means the
    last loop.
    """
    gates_TBL = gate_logits_TBL.astype(jnp.float32)
    log_remaining_TBL = _log_remaining(gates_TBL[:-1]) + jax.nn.log_sigmoid(-gates_TBL[:-1])
    never_BL = jnp.zeros((1, *gates_TBL.shape[1:]), bool)
    q = jnp.asarray(q, jnp.float32)
    foretold_TBL = (-jnp.expm1(log_remaining_TBL) >= q) & (q < 1)
    return _first(jnp.concatenate([never_BL, foretold_TBL]))


def hidden_difference_exit(states_TBLD: jax.Array, threshold: float) -> jax.Array:
    """The first loop, from the second on, whose state moved less than `threshold` from the last.

    Returns step_BL int32, 0-based; the last loop if no state settled.
    """
    return settled_exit(state_change(states_TBLD[1:], states_TBLD[:-1]), threshold)


def settled_exit(moved_TBL: jax.Array, threshold: float) -> jax.Array:
    """`hidden_difference_exit` from the state changes alone, those from the second loop on [T-1].

    Returns step_BL int32, 0-based, of T loops.
    """
    never_BL = jnp.zeros((1, *moved_TBL.shape[1:]), bool)
    return _first(jnp.concatenate([never_BL, moved_TBL < threshold]))


def state_change(state: jax.Array, before: jax.Array) -> jax.Array:
    """The L2 norm of h_t - h_{t-1} over the width, in float32 (paper, hidden-state difference)."""
    return jnp.linalg.norm(state.astype(jnp.float32) - before.astype(jnp.float32), axis=-1)


def confidence_exit(logits_TBLV: jax.Array, threshold: float) -> jax.Array:
    """The first loop whose most probable token has at least the probability `threshold`.

    Returns step_BL int32, 0-based; the last loop if none is that sure.
    """
    return sure_exit(top_probability(logits_TBLV), threshold)


def sure_exit(probability_TBL: jax.Array, threshold: float) -> jax.Array:
    """`confidence_exit` from the probabilities of the most probable tokens alone."""
    return _first(probability_TBL >= threshold)


def top_probability(logits: jax.Array) -> jax.Array:
    """Probability of the most probable token, float32, without the last axis.

    Written as 1 / Σ exp(logit - top), which compiles to two reductions and, unlike a logsumexp,
    keeps no float32 copy of bfloat16 logits.
    """
    top = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    return 1 / jnp.sum(jnp.exp(logits.astype(jnp.float32) - top), axis=-1)


def select_exit(states_TBLD: jax.Array, step_BL: jax.Array) -> jax.Array:
    """The state of each token after its exit loop: state_BLD, dtype of the states."""
    return jnp.take_along_axis(states_TBLD, step_BL[None, ..., None], axis=0)[0]


def _log_remaining(gate_logits_TBL: jax.Array) -> jax.Array:
    """ln ∏_{j<=t} (1 - λ_j), float32: not having left after loop t."""
    return jnp.cumsum(jax.nn.log_sigmoid(-gate_logits_TBL.astype(jnp.float32)), axis=0)


def _first(exits_TBL: jax.Array) -> jax.Array:
    """Index of the first true loop; the last loop where there is none."""
    return jnp.argmax(exits_TBL.at[-1].set(True), axis=0).astype(jnp.int32)


def _rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Float32 `x` rounded to the values of `dtype`.

    A pair of casts would not do: XLA may drop it (xla_allow_excess_precision).
    """
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)


def _published_cdf(gate_logits_TBL: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The cumulative exit distribution of the published code, as float32 values of `dtype`.

    Every product is rounded to `dtype`. The sum runs in float64 there and is rounded at each
    loop; here float32 carries the rounding error along (Knuth's two-sum), as x64 is off.
    Products and sums are two scans: in one, XLA contracts them to fused multiply-adds on CPU, in
    spite of a barrier, and the unrounded products changed the last bit of one float32 sum in ten.
    """
    halt_TBL = _rounded(jax.nn.sigmoid(gate_logits_TBL.astype(jnp.float32)), dtype)
    halt_TBL = halt_TBL.at[-1].set(1.0)

    def multiply(remaining_BL, halt_BL):
        p_BL = _rounded(remaining_BL * halt_BL, dtype)
        return _rounded(remaining_BL * _rounded(1.0 - halt_BL, dtype), dtype), p_BL

    def add(carry, p_BL):
        total_BL, error_BL = carry
        sum_BL = total_BL + p_BL
        added_BL = sum_BL - total_BL
        error_BL += (total_BL - (sum_BL - added_BL)) + (p_BL - added_BL)
        return (sum_BL, error_BL), _rounded(sum_BL + error_BL, dtype)

    zero_BL = jnp.zeros_like(halt_TBL[0])
    p_TBL = lax.scan(multiply, jnp.ones_like(zero_BL), halt_TBL)[1]
    return lax.scan(add, (zero_BL, zero_BL), p_TBL)[1]
