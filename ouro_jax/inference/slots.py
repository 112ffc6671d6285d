"""The compiled programs of the engine: read a piece of a prompt, take a slot, run one loop.

T loops, B slots of a step, H rows whose logits are computed, C positions of a piece of a prompt,
D model width, V vocabulary, A alternatives.

A step runs one loop for all slots, each at its own loop of its own token: the weights are the same.
Slots whose token leaves get its logits, their next token and its embedding in the same program.
Nothing in it waits for the host.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.config import ModelConfig
from ouro_jax.inference.requests import MOST_ALTERNATIVES
from ouro_jax.inference.sampling import Sampling, sample
from ouro_jax.model.cache import KVCache, condense, stand_in
from ouro_jax.model.exit import EXIT_RULES, lookahead_exit, q_exit, state_change, top_probability
from ouro_jax.model.int8 import SCALE
from ouro_jax.model.loop_lm import LoopLM, take_layers_apart

# A prompt goes through the model in pieces of these sizes: the scores of one are C × slots per
# head, and what is padded is less than the smallest.
PIECES = (512, 256, 128, 64)
NO_RULE = 0
RULE_CODES = {kind: code for code, kind in enumerate(EXIT_RULES, start=1)}
# A gate that has not been asked yet: exp(-1e4) is 0, so nothing leaves by it.
NOT_YET = -1e4


@dataclass(frozen=True)
class Program:
    """What the compiled programs depend on beside the shapes of their arrays.

    `loops` is the most that any request runs.
    """

    config: ModelConfig
    loops: int
    published_rounding: bool = False


class Asked(struct.PyTreeNode):
    """What the requests in the slots ask for, a number each."""

    sampling: Sampling
    rule_B: jax.Array
    value_B: jax.Array
    loops_B: jax.Array
    alternatives_B: jax.Array
    readouts_B: jax.Array


class Said(struct.PyTreeNode):
    """What a token is known to be once its exit loop has been read out; depth 0: not yet."""

    tokens_B: jax.Array
    depths_B: jax.Array
    logprobs_B: jax.Array
    alternatives_BA: jax.Array
    alternative_logprobs_BA: jax.Array


class Slots(struct.PyTreeNode):
    """Where every slot stands: the state and loop of its token, what it has shown, what is left."""

    x_BD: jax.Array
    loop_B: jax.Array
    positions_B: jax.Array
    left_B: jax.Array
    index_B: jax.Array
    keys_B: jax.Array
    gates_TB: jax.Array
    readout_TB: jax.Array
    readout_probability_TB: jax.Array
    said: Said
    asked: Asked

    def first(self, width: int) -> "Slots":
        """The first `width` slots."""
        return jax.tree.map(lambda x, axis: jax.lax.slice_in_dim(x, 0, width, axis=axis),
                            self, _slot_axes(self))  # fmt: skip

    def put(self, start: jax.Array | int, slots: "Slots") -> "Slots":
        """These slots with `slots` in the places from `start` on."""
        return jax.tree.map(
            lambda x, new, axis: jax.lax.dynamic_update_slice_in_dim(x, new, start, axis),
            self, slots, _slot_axes(self),
        )  # fmt: skip


class Report(struct.PyTreeNode):
    """What a step tells the host: which slots ended their token, and what it is."""

    finished_B: jax.Array
    said: Said
    gates_TB: jax.Array
    readout_TB: jax.Array
    readout_probability_TB: jax.Array


def _slot_axes(slots: Slots) -> Slots:
    axes = jax.tree.map(lambda _: 0, slots)
    return axes.replace(gates_TB=1, readout_TB=1, readout_probability_TB=1)


def cast_params(config: ModelConfig, params: dict) -> dict:
    """The parameters in the compute dtype, so that no step casts them again.

    The gate's bias stays: it is added in float32. So do int8 weights and their scales, with which
    a float32 sum is multiplied. Arrays that have the dtype are not copied.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(path, x):
        stays = path[-1].key in ("bias", SCALE) or x.dtype in (dtype, jnp.int8)
        return x if stays else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def decoding_params(config: ModelConfig, params: dict) -> dict:
    """`cast_params`, on CPU with every layer's in arrays of their own; given those, they stay.

    XLA for CPU copies what a scan over layers takes out of stacked arrays: a token of the model of
    `benchmarks.decode` takes 48 ms instead of 22. The price is a program for each layer: at 24
    layers and 4,096 positions a step compiles in 11 s, not in 2. XLA for TPU copies nothing.
    """
    if _are_apart(params):
        return params
    params = cast_params(config, params)
    return take_layers_apart(params) if jax.default_backend() == "cpu" else params


def _are_apart(params: dict) -> bool:
    return "layers" not in params["stack"]


def empty_slots(program: Program, count: int, parked: int) -> Slots:
    """`count` slots that nobody has; they write to the cache slot `parked`, which nothing reads."""
    config, loops = program.config, program.loops

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros(shape, dtype)

    said = _nothing_said(count)
    sampling = Sampling(zeros(count, dtype=jnp.float32), zeros(count),
                        jnp.ones(count, jnp.float32))  # fmt: skip
    asked = Asked(
        sampling, zeros(count), zeros(count, dtype=jnp.float32), jnp.full(count, loops, jnp.int32),
        zeros(count, dtype=bool), zeros(count, dtype=bool),
    )  # fmt: skip
    return Slots(
        zeros(count, config.hidden_size, dtype=jnp.dtype(config.dtype)), zeros(count),
        jnp.full(count, parked, jnp.int32), zeros(count), zeros(count),
        jax.random.split(jax.random.key(0), count),
        jnp.full((loops, count), NOT_YET, jnp.float32), zeros(loops, count),
        zeros(loops, count, dtype=jnp.float32), said, asked,
    )  # fmt: skip


def _nothing_said(count: int) -> Said:
    return Said(
        jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32), jnp.zeros(count),
        jnp.zeros((count, MOST_ALTERNATIVES), jnp.int32), jnp.zeros((count, MOST_ALTERNATIVES)),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def read_piece(
    program: Program,
    params: dict,
    cache: KVCache,
    tokens_BC: jax.Array,
    rows_B: jax.Array,
    starts_B: jax.Array,
    last_B: jax.Array,
    loops: jax.Array,
) -> tuple[KVCache, tuple[jax.Array, jax.Array]]:
    """All `loops` loops over a piece of prompts; the cache has a set for every loop.

    Args:
      tokens_BC: token ids, padded on the right.
      rows_B: cache rows of the prompts.
      starts_B: positions of the first tokens; what is before is in the cache already.
      last_B: index into C whose states [T, B, D] and gate logits [T, B] are returned.
      loops: how many loops to run, up to the program's; the rest of T is left at zero.
    """  # fmt: skip
    batch, chunk = tokens_BC.shape
    positions_BC = starts_B[:, None] + jnp.arange(chunk)
    run_loop = method(program.config, params, "loop")
    each = jnp.arange(batch)

    def loop(index, carry):
        x_BCD, cache, states_TBD, gates_TB = carry
        x_BCD, gates_BC, cache = run_loop(x_BCD, index, positions_BC, cache, rows_B)
        states_TBD = states_TBD.at[index].set(x_BCD[each, last_B])
        return x_BCD, cache, states_TBD, gates_TB.at[index].set(gates_BC[each, last_B])

    x_BCD = method(program.config, params, "embed")(tokens_BC)
    states_TBD = jnp.zeros((program.loops, batch, x_BCD.shape[-1]), x_BCD.dtype)
    gates_TB = jnp.full((program.loops, batch), NOT_YET, jnp.float32)
    _, cache, states_TBD, gates_TB = jax.lax.fori_loop(
        0, loops, loop, (x_BCD, cache, states_TBD, gates_TB)
    )
    return cache, (states_TBD, gates_TB)


@functools.partial(jax.jit, static_argnames="program", donate_argnames=("cache", "slots"))
def take_slot(
    program: Program,
    params: dict,
    cache: KVCache,
    slots: Slots,
    filled: KVCache | None,
    last: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    position: jax.Array,
    left: jax.Array,
    key: jax.Array,
    asked: Asked,
) -> tuple[KVCache, Slots, Report]:
    """Puts a request whose prompt has been read into a slot, with its first new token.

    Args:
      filled: a cache of one row that the prompt was read into, if it is to be condensed into the
        slot's; None if the prompt was read in place.
      last: what `read_piece` returned for the prompt's last token.
      position: where the new token goes, that is the length of the prompt.
      left: how many tokens are wanted, this one included.
      asked: of one slot.
    """  # fmt: skip
    states_TD, gates_T = last[0][:, 0], last[1][:, 0]
    loops = asked.loops_B[0]
    if filled is not None:
        cache = condense(filled, cache, slot, loops, states_TD.dtype)
    loop_T = jnp.arange(program.loops)
    moved_T = state_change(states_TD, jnp.roll(states_TD, 1, axis=0))
    logits_TV = method(program.config, params, "logits")(states_TD)
    asked_T = jax.tree.map(lambda x: jnp.broadcast_to(x, (program.loops, *x.shape[1:])), asked)
    gates_TT = jnp.broadcast_to(gates_T[:, None], (program.loops, program.loops))
    leaves_T = _leaves(program, asked_T, gates_TT, loop_T, moved_T)
    leaves_T |= _sure(asked_T, logits_TV)
    depth = jnp.argmax(leaves_T) + 1
    index = jnp.zeros(1, jnp.int32)
    said = _say(logits_TV[depth - 1][None], asked, key[None], index, depth[None])
    best_T, probability_T = jnp.argmax(logits_TV, axis=-1), top_probability(logits_TV)
    report = Report(
        jnp.ones(1, bool), said, gates_T[:, None], best_T[:, None].astype(jnp.int32),
        probability_T[:, None],
    )  # fmt: skip
    fresh = empty_slots(program, 1, 0).replace(
        x_BD=_embed(program, params, said.tokens_B), positions_B=position[None],
        left_B=left[None] - 1, index_B=index + 1, keys_B=key[None], asked=asked,
    )  # fmt: skip
    return cache, slots.put(slot, fresh), report


@functools.partial(jax.jit, donate_argnames="slots", static_argnames="parked")
def leave_slot(slots: Slots, slot: jax.Array, parked: int) -> Slots:
    """Ends what a slot is doing: it writes to the cache slot `parked` from now on."""
    return slots.replace(
        left_B=slots.left_B.at[slot].set(0), positions_B=slots.positions_B.at[slot].set(parked)
    )


@functools.partial(
    jax.jit, static_argnames=("program", "width"), donate_argnames=("cache", "slots")
)
def step(
    program: Program, params: dict, cache: KVCache, slots: Slots, width: int
) -> tuple[KVCache, Slots, Report]:
    """One loop for the first `width` slots. Cache and slots are given up and come back updated.

    With the policy `full` a token that has left still runs the deeper loops, for their keys and
    values: its slot ends the token after the last.
    """
    mine = slots.first(width)
    live_B = mine.left_B > 0
    rows_B, loop_B = jnp.arange(width), mine.loop_B
    longest = jnp.max(jnp.where(live_B, mine.positions_B, 0)) + 1
    x_B1D, gates_B1, cache = method(program.config, params, "loop")(
        mine.x_BD[:, None], loop_B, mine.positions_B[:, None], cache, rows_B, longest
    )
    x_BD = x_B1D[:, 0]
    gates_TB = mine.gates_TB.at[loop_B, rows_B].set(gates_B1[:, 0])
    open_B = live_B & (mine.said.depths_B == 0)
    leaves_B = _leaves(program, mine.asked, gates_TB, loop_B, state_change(x_BD, mine.x_BD))
    mine = mine.replace(x_BD=x_BD, gates_TB=gates_TB)
    mine = _read_out(program, params, mine, open_B & leaves_B, open_B, live_B)

    finished_B = live_B & (mine.said.depths_B > 0)
    if cache.policy == "full":
        finished_B &= loop_B == mine.asked.loops_B - 1
    if cache.policy == "exited":
        cache = stand_in(cache, rows_B, loop_B, mine.positions_B, finished_B)
    report = Report(
        finished_B, mine.said, mine.gates_TB, mine.readout_TB, mine.readout_probability_TB
    )
    following_BD = _embed(program, params, mine.said.tokens_B)
    return cache, slots.put(0, _next(mine, finished_B, following_BD)), report


def method(config: ModelConfig, params: dict, name: str) -> Callable[..., Any]:
    """A method of the model, with the parameters given."""
    model = LoopLM(config, remat="none", layers_apart=_are_apart(params))
    return functools.partial(model.apply, {"params": params}, method=name)


def _embed(program, params, tokens_B):
    return method(program.config, params, "embed")(tokens_B[:, None])[:, 0]


def _next(mine: Slots, finished_B: jax.Array, following_BD: jax.Array) -> Slots:
    """The slots at their next loop, or with the next token's embedding at its loop 0."""
    said = mine.said.replace(depths_B=jnp.where(finished_B, 0, mine.said.depths_B))
    moves_B = finished_B.astype(jnp.int32)
    return mine.replace(
        x_BD=jnp.where(finished_B[:, None], following_BD, mine.x_BD),
        loop_B=jnp.where(finished_B | (mine.left_B == 0), 0, mine.loop_B + 1),
        positions_B=mine.positions_B + moves_B,
        left_B=mine.left_B - moves_B,
        index_B=mine.index_B + moves_B,
        gates_TB=jnp.where(finished_B, NOT_YET, mine.gates_TB),
        said=said,
    )


def _leaves(program, asked: Asked, gates_TB, loop_B, moved_B) -> jax.Array:
    """Which rows leave after their loop by its gates and state; all do at their last loop.

    The rules are those of evaluation, on the gates so far: the gates not asked yet change nothing.
    """
    rounding = program.config.dtype if program.published_rounding else None
    value_B, rule_B = asked.value_B, asked.rule_B
    by_rule = {
        "static": loop_B + 1 >= value_B,
        "q": q_exit(gates_TB, value_B, rounding) <= loop_B,
        "hidden": (loop_B > 0) & (moved_B < value_B),
        "lookahead": lookahead_exit(gates_TB, value_B) <= loop_B,
    }
    leaves_B = loop_B >= asked.loops_B - 1
    for kind, leaves_by_rule_B in by_rule.items():
        leaves_B |= (rule_B == RULE_CODES[kind]) & leaves_by_rule_B
    return leaves_B


def _sure(asked: Asked, logits_BV: jax.Array) -> jax.Array:
    """Which rows leave by the confidence rule."""
    asks_B = asked.rule_B == RULE_CODES["confidence"]
    return asks_B & (top_probability(logits_BV) >= asked.value_B)


def _say(logits_BV, asked: Asked, keys_B, index_B, depths_B) -> Said:
    """The token drawn from each row of logits, with what is to be told of it."""
    tokens_B = sample(logits_BV, asked.sampling, keys_B, index_B)
    log_total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]

    def alternatives():
        most = min(MOST_ALTERNATIVES, logits_BV.shape[-1])
        top_BA, ids_BA = jax.lax.top_k(logits_BV, most)
        missing = ((0, 0), (0, MOST_ALTERNATIVES - most))
        return jnp.pad(ids_BA, missing), jnp.pad(top_BA - log_total_B[:, None], missing)

    def none():
        shape = (logits_BV.shape[0], MOST_ALTERNATIVES)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

    ids_BA, logprobs_BA = jax.lax.cond(jnp.any(asked.alternatives_B), alternatives, none)
    return Said(tokens_B, depths_B.astype(jnp.int32), chosen_B - log_total_B, ids_BA, logprobs_BA)


def _read_out(program, params, mine: Slots, leaves_B, open_B, live_B) -> Slots:
    """The slots with the tokens of those that leave, and with what readers of every loop want."""
    asks_B = open_B & (mine.asked.rule_B == RULE_CODES["confidence"])
    wants_B = leaves_B | asks_B | (live_B & mine.asked.readouts_B)

    def say(mine):
        logits_BV = _some_logits(program, params, mine.x_BD, wants_B)
        now_B = leaves_B | (asks_B & _sure(mine.asked, logits_BV))
        said = _say(logits_BV, mine.asked, mine.keys_B, mine.index_B, mine.loop_B + 1)
        best_B, rows_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.arange(len(now_B))
        probability_B = top_probability(logits_BV)
        return mine.replace(
            said=jax.tree.map(
                lambda new, old: jnp.where(now_B.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                said, mine.said,
            ),
            readout_TB=mine.readout_TB.at[mine.loop_B, rows_B].set(best_B),
            readout_probability_TB=mine.readout_probability_TB.at[mine.loop_B, rows_B].set(
                probability_B
            ),
        )  # fmt: skip

    return jax.lax.cond(jnp.any(wants_B), say, lambda mine: mine, mine)


def _some_logits(program, params, x_BD, wants_B) -> jax.Array:
    """Logits [B, V] of the rows wanted, zeros for the others.

    The product with the head is computed for as many rows as want it, rounded up to a power of two.
    """
    head = method(program.config, params, "logits")
    order_B = jnp.argsort(~wants_B, stable=True)
    width = len(order_B)
    sizes = [*(2**power for power in range(width.bit_length()) if 2**power < width), width]

    def of(size):
        def branch(x_BD):
            logits_HV = head(x_BD[order_B[:size]])
            return jnp.zeros((width, logits_HV.shape[1])).at[order_B[:size]].set(logits_HV)

        return branch

    index = jnp.sum(jnp.sum(wants_B) > jnp.array(sizes[:-1], jnp.int32))
    return jax.lax.switch(index, [of(size) for size in sizes], x_BD)
