"""What drafts of fewer loops gain over plain decoding, by loops, drafts and acceptance.

    python -m benchmarks.speculate [--speculate=1x1,1x3,2x2] [--change=0,0.1,0.3,1] [--pairs=3]

Shape: hidden 512, 8 layers, 8 heads, FFN 1408, vocabulary 8192, T = 4, float32, one prompt of 64
tokens, 64 new ones. Weights are random. `--change` scales the output norms of all layers: how much
a loop adds to the state that it was given. At 0 the loops agree and every draft is right; the more
they change, the fewer are. The acceptance that came of it is what counts, and is printed.

A pair is a plain answer and a speculative one, in turn, so that both meet the same machine: the
speed-up is the median of the pairs' quotients. It concerns the tokens after the first, whose
prefill is the same. Answers are greedy, and must be equal.

The bound counts the weights that have to be read, stack and head, at one speed for both, and
nothing else: T·S + H bytes a token against (M·s + T)·S + (M + 1)·H a round, S the stack and H the
head, read M times for drafts and once to verify. `break_even` is the acceptance at which the
bound is 1, if drafts are right independently of each other.

The bound takes a loop over M + 1 positions to cost what one over a single position does. `wide` is
what it does cost here, in those, measured by itself; `reachable` is the bound with that cost.

L positions of a pass, D model width.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import random_params, seconds, shown
from ouro_jax.config import ModelConfig
from ouro_jax.inference.generate import Generation, generate
from ouro_jax.inference.slots import method
from ouro_jax.inference.speculate import parse_speculation
from ouro_jax.model.cache import empty_cache

PROMPT, NEW_TOKENS, LOOPS = 64, 64, 4

_SPECULATE = flags.DEFINE_list("speculate", ["1x1", "1x3", "1x7", "2x1", "2x3", "3x3"], "SxM.")
_CHANGE = flags.DEFINE_list("change", ["0", "0.1", "0.3", "1"], "Scales of the output norms.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Timed pairs, after one that is not.", 1)


def main(_) -> None:
    """Prints a line for every (SxM, change), and all of them as one JSON line last."""
    config = ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=8, head_dim=64, num_loops=LOOPS, dtype="float32",
        embedding_initializer_range=1.0,
    )  # fmt: skip
    params = random_params(config)
    rows = []
    for speculate in _SPECULATE.value:
        for change in map(float, _CHANGE.value):
            rows.append(measure(config, changing(params, change), speculate, _PAIRS.value))
            rows[-1]["change"] = change
            if len(rows) == 1:
                print("".join(f"{name:>18s}" for name in rows[0]))
            print("".join(f"{shown(value):>18s}" for value in rows[-1].values()), flush=True)
    print(json.dumps(rows))


def changing(params: dict, change: float) -> dict:
    """The parameters with the output norms of every layer scaled by `change`."""

    def scale(path, x):
        return x * change if any("layernorm_2" in str(key) for key in path) else x

    return jax.tree_util.tree_map_with_path(scale, params)


def measure(config: ModelConfig, params: dict, speculate: str, pairs: int) -> dict[str, Any]:
    """Speed-up, acceptance and bounds of one SxM and one model."""
    draft_loops, drafts = parse_speculation(speculate, LOOPS)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT).tolist()
    plain_ms, speed_ups, out = [], [], None
    for pair in range(pairs + 1):
        plain_seconds, plain = timed(config, params, prompt, None)
        drafted_seconds, out = timed(config, params, prompt, speculate)
        if plain.tokens != out.tokens:
            raise AssertionError(f"speculate = {speculate}: another answer than plain decoding's")
        if pair > 0:  # the first paid for the compilation
            plain_ms.append(1e3 * plain_seconds / (NEW_TOKENS - 1))
            speed_ups.append(plain_seconds / drafted_seconds)
    acceptance = out.acceptance if out else None
    assert acceptance and acceptance.rate is not None and acceptance.tokens_per_round
    tokens, wide = acceptance.tokens_per_round, cost_of_width(config, params, drafts + 1)
    cost = cost_of_round(params, draft_loops, drafts)
    return {
        "speculate": speculate,
        "acceptance": acceptance.rate,
        "tokens_per_round": tokens,
        "plain_ms": statistics.median(plain_ms),
        "speed_up": statistics.median(speed_ups),
        "wide": wide,
        "reachable": tokens / cost_of_round(params, draft_loops, drafts, wide),
        "bound": tokens / cost,
        "most": (drafts + 1) / cost,
        "break_even": break_even(cost, drafts),
    }


def timed(
    config: ModelConfig, params: dict, prompt: list[int], speculate: str | None
) -> tuple[float, Generation]:
    """Seconds from the first token to the end of the answer, and the answer."""
    stamps = []
    out = generate(
        config, params, [prompt], NEW_TOKENS, speculate=speculate,
        on_token=lambda *_: stamps.append(time.perf_counter()),
    )  # fmt: skip
    return stamps[-1] - stamps[0], out


def cost_of_round(params: dict, draft_loops: int, drafts: int, wide: float = 1.0) -> float:
    """Weights that a round reads, in those that plain decoding reads for a token.

    What verifies, T - s loops and one head, counts `wide` times.
    """
    stack = sum(x.size for x in jax.tree.leaves(params["stack"]))
    head = params["lm_head"]["kernel"].size
    draft = (drafts + 1) * draft_loops * stack + drafts * head
    verify = (LOOPS - draft_loops) * stack + head
    return (draft + wide * verify) / (LOOPS * stack + head)


def cost_of_width(config: ModelConfig, params: dict, width: int) -> float:
    """Time of loops over `width` positions of one row in that of loops over one: medians, in turn.

    Every pass is of T loops behind the prompt, with the cache.
    """

    @jax.jit
    def run(params, x_BLD):
        run_loop = method(config, params, "loop")
        positions_BL = PROMPT + jnp.arange(x_BLD.shape[1])[None]

        def loop(carry, index):
            x_BLD, _, cache = run_loop(carry[0], index, positions_BL, carry[1])
            return (x_BLD, cache), None

        cache = empty_cache(config, 1, PROMPT + NEW_TOKENS, LOOPS)
        return jax.lax.scan(loop, (x_BLD, cache), jnp.arange(LOOPS))[0][0]

    inputs = [jnp.ones((1, length, config.hidden_size)) for length in (1, width)]
    times = [[seconds(run, params, x_BLD) for x_BLD in inputs] for _ in range(12)]
    single, many = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return many / single


def break_even(round_cost: float, drafts: int) -> float:
    """The acceptance a at which 1 + a + … + a^M tokens are worth a round; NaN if more than 1."""
    if round_cost > drafts + 1:
        return float("nan")
    low, high = 0.0, 1.0
    for _ in range(50):
        a = (low + high) / 2
        tokens = sum(a**draft for draft in range(drafts + 1))
        low, high = (a, high) if tokens < round_cost else (low, a)
    return high


if __name__ == "__main__":
    app.run(main)
