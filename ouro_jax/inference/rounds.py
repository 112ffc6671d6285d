"""Self-speculation, compiled: draft with the first s loops, verify with the loops that are left.

T loops, B batch rows, L prompt positions, C positions of one chunk of the prompt, M drafts of a
round, N = M + 1 positions that it passes, D model width, V vocabulary.

A round starts from a row's newest token, which no loop has seen yet. M + 1 times a token goes
through loops 1 … s alone; from the state after the first M of these the next token is drafted. The
M + 1 states then go through loops s + 1 … T in one pass. Loop t of a position reads keys and values
that loop t wrote at earlier positions, and nothing else: so the states are those of plain decoding,
and nothing that a draft computed is computed again. The last position judges no draft: its
distribution gives a token for nothing when all drafts were right. A round reads the weights of
(M + 1)·s + T - s loops and of the head M + 1 times, and makes 1 … M + 1 tokens.

What a refused draft left in the cache lies beyond the row's position: no query sees it before the
token that belongs there has overwritten it, in every loop.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.config import ModelConfig
from ouro_jax.inference.sampling import Sampling, limit
from ouro_jax.inference.slots import method
from ouro_jax.model.cache import KVCache, empty_cache

# Longer prompts go through the model in chunks, so that scores are C × slots and not L × slots.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class RoundProgram:
    """What the compiled programs depend on beside the shapes of their arrays.

    `loops` are run for every token of the answer, `draft_loops` of them (fewer) for a draft;
    `drafts` is M. The last position that a round passes must lie within `num_slots`.
    """

    config: ModelConfig
    loops: int
    draft_loops: int
    drafts: int
    num_slots: int


@struct.dataclass
class RoundRows:
    """Where every row stands between rounds.

    `tokens_B` is the newest token, `positions_B` its place, `left_B` how many are still wanted: a
    row with none left stays where it is. `round` counts from 1; with the row's key it decides what
    is drawn.
    """

    tokens_B: jax.Array
    positions_B: jax.Array
    left_B: jax.Array
    keys_B: jax.Array
    round: jax.Array


@struct.dataclass
class Outcome:
    """What a round gave: the first `accepted_B` tokens of a row are drafts, one more follows."""

    tokens_BN: jax.Array
    accepted_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "loops", "num_slots"))
def read_prompts(
    config: ModelConfig,
    loops: int,
    num_slots: int,
    params: dict,
    prompts_BL: jax.Array,
    lengths_B: jax.Array,
    left_B: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling,
) -> tuple[KVCache, RoundRows]:
    """Passes the prompts through all loops: the filled cache, and every row's first new token.

    Args:
      config, loops, num_slots: as in `RoundProgram`; how drafts are made does not matter here.
      prompts_BL: token ids, padded on the right; L is at most PREFILL_CHUNK or a multiple of it.
      lengths_B: tokens of each prompt.
      left_B: tokens wanted of each row after the first.
      keys_B: random keys of the rows.
    """
    batch, length = prompts_BL.shape
    chunk = min(length, PREFILL_CHUNK)
    rows_B, offsets_C = jnp.arange(batch), jnp.arange(chunk)

    def read_chunk(carry, start):
        cache, last_BD = carry
        tokens_BC = jax.lax.dynamic_slice_in_dim(prompts_BL, start, chunk, axis=1)
        positions_BC = jnp.broadcast_to(start + offsets_C, (batch, chunk))
        x_BCD = method(config, params, "embed")(tokens_BC)
        x_BCD, cache = _loops(config, params, x_BCD, 0, loops, positions_BC, cache)
        index_B = lengths_B - 1 - start
        here_B = (index_B >= 0) & (index_B < chunk)
        state_BD = x_BCD[rows_B, jnp.clip(index_B, 0, chunk - 1)]
        return (cache, jnp.where(here_B[:, None], state_BD, last_BD)), None

    empty = empty_cache(config, batch, num_slots, loops)
    last_BD = jnp.zeros((batch, config.hidden_size), config.dtype)
    starts = jnp.arange(0, length, chunk)
    (cache, last_BD), _ = jax.lax.scan(read_chunk, (empty, last_BD), starts)
    p_BV = probabilities(method(config, params, "logits")(last_BD), sampling)
    tokens_B = _draw(p_BV, keys_B, 0)
    return cache, RoundRows(tokens_B, lengths_B, left_B, keys_B, jnp.ones((), jnp.int32))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def play_round(
    program: RoundProgram, params: dict, cache: KVCache, rows: RoundRows, sampling: Sampling
) -> tuple[KVCache, RoundRows, Outcome]:
    """Drafts M tokens for every row and verifies them.

    The cache is given up and comes back updated in place. Rows accept different numbers of drafts
    and go on from different positions.
    """
    keys_B = _fold(rows.keys_B, rows.round)
    cache, states_BND, drafts_BN, q_BNV = _draft(program, params, cache, rows, keys_B, sampling)

    steps_N = jnp.arange(program.drafts + 1)
    positions_BN = rows.positions_B[:, None] + steps_N
    states_BND, cache = _loops(
        program.config, params, states_BND, program.draft_loops, program.loops, positions_BN, cache
    )
    logits_BNV = method(program.config, params, "logits")(states_BND)
    p_BNV = jax.vmap(probabilities, (1, None), 1)(logits_BNV, sampling)
    accepted_B, last_B = judge(p_BNV, q_BNV, drafts_BN, _fold(keys_B, program.drafts + 1))

    tokens_BN = jnp.where(steps_N < accepted_B[:, None], drafts_BN, last_B[:, None])
    taken_B = jnp.minimum(accepted_B + 1, rows.left_B)
    newest_B = jnp.take_along_axis(tokens_BN, jnp.maximum(taken_B - 1, 0)[:, None], axis=1)[:, 0]
    following = RoundRows(
        jnp.where(taken_B > 0, newest_B, rows.tokens_B), rows.positions_B + taken_B,
        rows.left_B - taken_B, rows.keys_B, rows.round + 1,
    )  # fmt: skip
    return cache, following, Outcome(tokens_BN, accepted_B)


def probabilities(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """What tokens are drawn from, after temperature, top-k and top-p: [B, V], float32.

    At temperature 0 the most probable token has all of it. Drafts are then accepted if they equal
    it, and the residual is that token: greedy decoding needs no rule of its own.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    drawn_B1 = sampling.temperature_B[:, None] > 0
    greedy_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])

    def draw():
        scaled_BV = logits_BV / jnp.where(drawn_B1, sampling.temperature_B[:, None], 1)
        unlimited = jnp.all((sampling.top_k_B == 0) & (sampling.top_p_B == 1))
        kept_BV = jax.lax.cond(unlimited, lambda: scaled_BV, lambda: limit(scaled_BV, sampling))
        return jnp.where(drawn_B1, jax.nn.softmax(kept_BV, axis=-1), greedy_BV)

    return jax.lax.cond(jnp.any(drawn_B1), draw, lambda: greedy_BV)


def judge(
    p_BNV: jax.Array, q_BNV: jax.Array, drafts_BN: jax.Array, keys_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many drafts each row accepts, and the token that follows them, both int32 [B].

    A draft x of q is accepted with probability min(1, p(x) / q(x)); the first that is not is
    replaced by a draw from the residual. So every token is distributed as p (Leviathan et al. 2023,
    arXiv:2211.17192, appendix A.1). The q of the last position, which has no draft, is 0: what
    remains of p there is p.
    """
    p_BM, q_BM = (
        jnp.take_along_axis(x_BNV, drafts_BN[..., None], axis=-1)[:, :-1, 0]
        for x_BNV in (p_BNV, q_BNV)
    )
    drawn_BM = jax.vmap(functools.partial(jax.random.uniform, shape=p_BM.shape[1:]))(
        _fold(keys_B, 0)
    )
    # Of equal probabilities every draft is accepted: what is drawn is less than 1.
    right_BM = drawn_BM * q_BM < p_BM
    accepted_B = jnp.sum(jnp.cumprod(right_BM, axis=1, dtype=jnp.int32), axis=1)
    p_BV, q_BV = (
        jnp.take_along_axis(x_BNV, accepted_B[:, None, None], axis=1)[:, 0]
        for x_BNV in (p_BNV, q_BNV)
    )
    return accepted_B, _draw(residual(p_BV, q_BV), keys_B, 1)


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """What drafts of q leave of p: max(p - q, 0), not normalised.

    Distributions that differ by rounding alone may leave nothing, and then p itself is as good.
    """
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    return jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)


def _draft(program, params, cache, rows, keys_B, sampling):
    """N passes of the first loops: the cache, their states, M drafts (and one idle), and their q.

    The last pass drafts nothing: its q is 0 and the head is not read.
    """
    embed = method(program.config, params, "embed")
    head = method(program.config, params, "logits")
    batch, vocab = rows.tokens_B.shape[0], program.config.vocab_size

    def step(carry, index):
        cache, tokens_B = carry
        positions_B1 = (rows.positions_B + index)[:, None]
        x_B1D, stop = embed(tokens_B[:, None]), program.draft_loops
        state_B1D, cache = _loops(program.config, params, x_B1D, 0, stop, positions_B1, cache)

        def draft():
            q_BV = probabilities(head(state_B1D[:, 0]), sampling)
            return q_BV, _draw(q_BV, keys_B, index)

        def idle():
            return jnp.zeros((batch, vocab)), tokens_B

        q_BV, drafts_B = jax.lax.cond(index < program.drafts, draft, idle)
        return (cache, drafts_B), (state_B1D[:, 0], drafts_B, q_BV)

    (cache, _), by_step = jax.lax.scan(step, (cache, rows.tokens_B), jnp.arange(program.drafts + 1))
    states_BND, drafts_BN, q_BNV = (jnp.moveaxis(x, 0, 1) for x in by_step)
    return cache, states_BND, drafts_BN, q_BNV


def _loops(config, params, x_BCD, start, stop, positions_BC, cache):
    """Loops `start` … `stop` - 1, from 0, over the positions given: (x_BCD, cache)."""
    run_loop = method(config, params, "loop")

    def loop(carry, index):
        x_BCD, _, cache = run_loop(carry[0], index, positions_BC, carry[1])
        return (x_BCD, cache), None

    carry, _ = jax.lax.scan(loop, (x_BCD, cache), jnp.arange(start, stop))
    return carry


def _fold(keys_B: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def _draw(p_BV: jax.Array, keys_B: jax.Array, number: jax.Array | int) -> jax.Array:
    """A token of each row from weights that need not sum to 1, int32 [B]."""
    return jax.vmap(jax.random.categorical)(_fold(keys_B, number), jnp.log(p_BV)).astype(jnp.int32)
