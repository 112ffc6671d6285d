"""Log-likelihoods of continuations at any depth: one full forward, the head only where it is asked.

T loops, B batch, L sequence, N scored positions, C positions of a chunk, K chunks, D model width,
V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.errors import ConfigError, require
from ouro_jax.model.exit import (
    ExitRule,
    hidden_difference_exit,
    lookahead_exit,
    parse_exit_rule,
    q_exit,
    select_exit,
    static_exit,
    sure_exit,
    top_probability,
)
from ouro_jax.model.loop_lm import LoopLM, LoopOutput
from ouro_jax.parallel.attention import attention_for
from ouro_jax.parallel.mesh import complete_axes, make_mesh, use_mesh

# Tokens of a batch: enough to fill a CPU, little beside the weights of a released model.
BATCH_TOKENS = 8192
SHORTEST_ROW = 32
FEWEST_SCORED = 256
# Positions whose logits exist at once: 200 MB of them for a vocabulary of 49,152.
CHUNK = 1024

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation) as token ids; neither is empty."""


class Score(NamedTuple):
    """ln p(continuation | context), whether greedy decoding gives it, and its tokens' depths.

    `depth` is the sum over the continuation's tokens of the loop, from 1, that was read.
    """

    logprob: float
    greedy: bool
    depth: int


class _Row(NamedTuple):
    """A row of the model's input, and which pairs read their continuation off its end."""

    tokens: tuple[int, ...]
    pairs: list[int]


def score(
    config: ModelConfig,
    params: Any,
    pairs: Sequence[Pair],
    loops: int | None = None,
    exit: str | None = None,
    window: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Scores every continuation by a full forward; the order is that of `pairs`.

    Rows are sorted by length and padded to powers of two, as their number is, so that few programs
    are compiled.
    Pairs that differ in the last token alone, as answers A to D do, share a row.

    Args:
      config, params: as `load_huggingface` gives them.
      pairs: a context that does not fit beside its continuation is cut on the left.
      loops: loops to run; `config.num_loops` if None.
      exit: as `parse_exit_rule` reads it: the state of the loop where the rule stops is read for
        each token. All loops run for all tokens, which is the KV policy `full`.
      window: positions of a row; `config.max_position_embeddings` if None.
      batch_tokens: positions of a batch, padding included; a longer row is a batch of its own.
      on_scored: called with the number of pairs that each batch has scored.

    Raises ConfigError for settings out of their range and a continuation beyond the window.
    """
    loops, rule = depth_settings(config, loops, exit)
    window = config.max_position_embeddings if window is None else window
    scores: list[Score | None] = [None] * len(pairs)
    for length, batch in _batches(_rows(pairs, window), window, batch_tokens):
        order = [index for row in batch for index in row.pairs]
        found = _score_batch(config, params, pairs, batch, length, loops, rule)
        for index, result in zip(order, found, strict=True):
            scores[index] = result
        on_scored(len(order))
    return cast(list[Score], scores)


def depth_settings(
    config: ModelConfig, loops: int | None, exit: str | None
) -> tuple[int, ExitRule | None]:
    """The loops that are needed and the rule that reads among them; ConfigError if out of range.

    `static:2` is two loops and no rule: a full forward never looks at deeper ones.
    """
    loops = config.num_loops if loops is None else loops
    require(loops >= 1, "loops", loops, "at least 1")
    rule = None if exit is None else parse_exit_rule(exit)
    if rule is not None and rule.kind == "static":
        require(rule.value <= loops, "exit", exit, f"at most the {loops} loops that are run")
        return int(rule.value), None
    return loops, rule


def exit_steps(
    rule: ExitRule | None,
    states_TCD: jax.Array,
    gates_TC: jax.Array,
    logits: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The exit loop of each token, counted from 0: step_C int32; the last loop without a rule.

    `logits` maps states to logits; only `confidence` calls it, for one loop at a time.
    """
    if rule is None:
        return static_exit(gates_TC, gates_TC.shape[0])
    if rule.kind == "static":
        return static_exit(gates_TC, int(rule.value))
    if rule.kind == "q":
        return q_exit(gates_TC, rule.value)
    if rule.kind == "lookahead":
        return lookahead_exit(gates_TC, rule.value)
    if rule.kind == "hidden":
        return hidden_difference_exit(states_TCD, rule.value)
    confidence_TC = lax.map(lambda state_CD: top_probability(logits(state_CD)), states_TCD)
    return sure_exit(confidence_TC, rule.value)


def _rows(pairs: Sequence[Pair], window: int) -> list[_Row]:
    """The inputs of the pairs, each once, the longest first: what is too much memory fails soon."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if len(context) == 0 or len(continuation) == 0:
            raise ConfigError("a context and a continuation need at least one token each.")
        if len(continuation) > window:
            raise ConfigError(
                f"a continuation of {len(continuation):,} tokens does not fit into the window of "
                f"{window:,} positions."
            )
        tokens = (*context, *continuation)[-(window + 1) : -1]
        rows.setdefault(tokens, []).append(index)
    return sorted(map(_Row, *zip(*rows.items(), strict=True)), key=_longest_first) if rows else []


def _longest_first(row: _Row) -> int:
    return -len(row.tokens)


def _batches(
    rows: Sequence[_Row], window: int, batch_tokens: int
) -> Iterator[tuple[int, list[_Row]]]:
    """Batches of rows, longest first, with the length that their rows are padded to."""
    start = 0
    while start < len(rows):
        longest = len(rows[start].tokens)
        length = min(max(_power_of_two(longest), SHORTEST_ROW), window)
        end = start + max(1, batch_tokens // length)
        yield length, list(rows[start:end])
        start = end


def _score_batch(
    config: ModelConfig, params: Any, pairs: Sequence[Pair], batch: Sequence[_Row], length: int,
    loops: int, rule: ExitRule | None,
) -> Iterator[Score]:  # fmt: skip
    """The scores of a batch's pairs, row by row."""
    tokens_BL = np.zeros((_power_of_two(len(batch)), length), np.int32)
    rows, places, targets, sizes = [], [], [], []
    for number, row in enumerate(batch):
        tokens_BL[number, : len(row.tokens)] = row.tokens
        for index in row.pairs:
            continuation = pairs[index][1]
            sizes.append(len(continuation))
            rows += [number] * len(continuation)
            places += range(len(row.tokens) - len(continuation), len(row.tokens))
            targets += continuation
    padding = (0, max(_power_of_two(len(targets)), FEWEST_SCORED) - len(targets))
    asked = [np.pad(np.array(x, np.int32), padding) for x in (rows, places, targets)]
    mesh = _one_device()
    with use_mesh(mesh):
        found = jax.device_get(_program(config, loops, rule, mesh)(params, tokens_BL, *asked))
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        logprobs, greedy, steps = (x_N[start:end] for x_N in found)
        # A sum of float32 over thousands of tokens would lose what the comparison needs.
        yield Score(
            float(logprobs.sum(dtype=np.float64)), bool(greedy.all()), int((steps + 1).sum())
        )


@functools.cache
def _one_device() -> jax.sharding.Mesh:
    return make_mesh(complete_axes(MeshConfig(), 1), jax.devices()[:1])


@functools.cache
def _program(config: ModelConfig, loops: int, rule: ExitRule | None, mesh: jax.sharding.Mesh):
    """The jitted (params, tokens_BL, rows_N, places_N, targets_N) → logprob, greedy, step, of N."""

    def run(params, tokens_BL, rows_N, places_N, targets_N):
        model = LoopLM(config, attention_for(config, tokens_BL.shape[1], mesh), "none")

        def logits(state_CD: jax.Array) -> jax.Array:
            return cast(jax.Array, model.apply({"params": params}, state_CD, method="logits"))

        def read(chunk):
            states_TCD, gates_TC, targets_C = chunk
            step_C = exit_steps(rule, states_TCD, gates_TC, logits)
            logits_CV = logits(select_exit(states_TCD, step_C))
            logprobs_CV = jax.nn.log_softmax(logits_CV)
            logprob_C = jnp.take_along_axis(logprobs_CV, targets_C[:, None], axis=1)[:, 0]
            return logprob_C, jnp.argmax(logits_CV, axis=-1) == targets_C, step_C

        out = cast(LoopOutput, model.apply({"params": params}, tokens_BL, num_loops=loops))
        states_TND = out.states_TBLD[:, rows_N, places_N]
        gates_TN = out.gate_logits_TBL[:, rows_N, places_N]
        chunks = max(1, len(targets_N) // CHUNK)
        states_KTCD = jnp.stack(jnp.split(states_TND, chunks, axis=1))
        gates_KTC = jnp.stack(jnp.split(gates_TN, chunks, axis=1))
        found = lax.map(read, (states_KTCD, gates_KTC, targets_N.reshape(chunks, -1)))
        return jax.tree.map(lambda x_KC: x_KC.reshape(-1), found)

    return jax.jit(run)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
