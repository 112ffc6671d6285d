"""The two compiled programs of an answer: prefill and decode, with static shapes.

T loops, B batch rows, L prompt positions, C positions of one chunk of the prompt, D model width,
V vocabulary.

Rows are padded on the right and count positions from 0, so a row's next token always takes the
slot after its last one: what padding left in later slots is overwritten before it is seen.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.config import ModelConfig
from ouro_jax.inference.sampling import Sampling, sample
from ouro_jax.model.cache import KVCache, empty_cache
from ouro_jax.model.exit import (
    ExitRule,
    confidence_exit,
    hidden_difference_exit,
    q_exit,
    select_exit,
    static_exit,
)
from ouro_jax.model.loop_lm import LoopLM

# A prompt goes through the model in chunks: the scores of one are C × slots per head, and not the
# whole prompt squared.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on beside the shapes of its arrays.

    `loops` are run for every token and `exit` says which one's state is read (None: the last).
    """

    config: ModelConfig
    loops: int
    exit: ExitRule | None
    published_rounding: bool
    num_slots: int


@struct.dataclass
class Rows:
    """Where every row stands: its newest token, that token's depth (1-based) and position."""

    tokens_B: jax.Array
    depths_B: jax.Array
    positions_B: jax.Array
    keys_B: jax.Array
    step: jax.Array


def cast_params(config: ModelConfig, params: dict) -> dict:
    """The parameters in the compute dtype, so that no step casts them again.

    The gate's bias stays: it is added in float32. Arrays that have the dtype are not copied.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(path, x):
        return x if path[-1].key == "bias" or x.dtype == dtype else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames="program")
def prefill(
    program: Program,
    params: dict,
    prompts_BL: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling,
) -> tuple[KVCache, Rows]:
    """Reads the prompts; returns the filled cache and the first new token of every row.

    Args:
      prompts_BL: token ids, padded on the right; L is at most PREFILL_CHUNK or a multiple of it.
      lengths_B: tokens of each prompt.
      keys_B: random keys of the rows.
    """
    batch, length = prompts_BL.shape
    chunk = min(length, PREFILL_CHUNK)
    offsets_C = jnp.arange(chunk)

    def read_chunk(carry, start):
        cache, last_TBD, gates_TB = carry
        tokens_BC = jax.lax.dynamic_slice_in_dim(prompts_BL, start, chunk, axis=1)
        positions_BC = jnp.broadcast_to(start + offsets_C, (batch, chunk))
        # Where the prompt's last token is, if it is in this chunk.
        index_B = jnp.clip(lengths_B - 1 - start, 0, chunk - 1)
        cache, (states_TBD, chunk_gates_TB) = _run_loops(
            program, params, tokens_BC, positions_BC, index_B, cache
        )
        here_B = (lengths_B > start) & (lengths_B <= start + chunk)
        last_TBD = jnp.where(here_B[:, None], states_TBD, last_TBD)
        return (cache, last_TBD, jnp.where(here_B, chunk_gates_TB, gates_TB)), None

    config, loops = program.config, program.loops
    carry = (
        empty_cache(config, batch, program.num_slots, loops),
        jnp.zeros((loops, batch, config.hidden_size), config.dtype),
        jnp.zeros((loops, batch), jnp.float32),
    )
    carry, _ = jax.lax.scan(read_chunk, carry, jnp.arange(0, length, chunk))
    cache, last_TBD, gates_TB = carry
    logits_BV, depths_B = _read_out(program, params, last_TBD, gates_TB)
    step = jnp.zeros((), jnp.int32)
    tokens_B = sample(logits_BV, sampling, keys_B, step)
    return cache, Rows(tokens_B, depths_B, lengths_B, keys_B, step)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def decode(
    program: Program, params: dict, cache: KVCache, rows: Rows, sampling: Sampling
) -> tuple[KVCache, Rows]:
    """One more token for every row. The cache is given up and comes back updated in place."""
    cache, (states_TBD, gates_TB) = _run_loops(
        program, params, rows.tokens_B[:, None], rows.positions_B[:, None],
        jnp.zeros_like(rows.positions_B), cache,
    )  # fmt: skip
    logits_BV, depths_B = _read_out(program, params, states_TBD, gates_TB)
    step = rows.step + 1
    tokens_B = sample(logits_BV, sampling, rows.keys_B, step)
    return cache, Rows(tokens_B, depths_B, rows.positions_B + 1, rows.keys_B, step)


def _method(program: Program, params: dict, name: str) -> Callable[..., Any]:
    """A method of the model, with the parameters given."""
    model = LoopLM(program.config, remat="none")
    return functools.partial(model.apply, {"params": params}, method=name)


def _run_loops(program, params, tokens_BC, positions_BC, index_B, cache):
    """All loops over the tokens given: the cache, and states and gates at `index_B` of each row."""
    run_loop = _method(program, params, "loop")

    def loop(carry, index):
        x_BCD, gates_BC, cache = run_loop(carry[0], index, positions_BC, carry[1])
        rows_B = jnp.arange(x_BCD.shape[0])
        return (x_BCD, cache), (x_BCD[rows_B, index_B], gates_BC[rows_B, index_B])

    x_BCD = _method(program, params, "embed")(tokens_BC)
    (_, cache), read_T = jax.lax.scan(loop, (x_BCD, cache), jnp.arange(program.loops))
    return cache, read_T


def _read_out(program, params, states_TBD, gates_TB):
    """Logits of the exit state of every row, and its depth from 1."""
    head = _method(program, params, "logits")
    rule = program.exit
    if rule is not None and rule.kind == "confidence":
        logits_TBV = head(states_TBD)
        step_B = confidence_exit(logits_TBV, rule.value)
        return select_exit(logits_TBV, step_B), step_B + 1
    step_B = _exit_step(program, states_TBD, gates_TB)
    return head(select_exit(states_TBD, step_B)), step_B + 1


def _exit_step(program, states_TBD, gates_TB):
    rule = program.exit
    if rule is None:
        return static_exit(gates_TB, program.loops)
    if rule.kind == "static":
        return static_exit(gates_TB, int(rule.value))
    if rule.kind == "hidden":
        return hidden_difference_exit(states_TBD, rule.value)
    rounding = program.config.dtype if program.published_rounding else None
    return q_exit(gates_TB, rule.value, rounding)
