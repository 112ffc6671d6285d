"""`generate`: prompts in, new tokens and the depth of each out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ouro_jax.config import ModelConfig
from ouro_jax.errors import require, require_choice
from ouro_jax.inference.engine import Engine
from ouro_jax.inference.requests import Request, check_prompt, check_request
from ouro_jax.inference.speculate import Acceptance, speculative_generate
from ouro_jax.model.cache import KV_POLICIES
from ouro_jax.model.exit import parse_exit_rule

# Prompts answered at once; the others join as these end.
MOST_SLOTS = 32

OnToken = Callable[[int, int, int], None]
"""(row of the prompt, its next token, that token's depth)."""


@dataclass(frozen=True)
class Generation:
    """New tokens of each prompt, without the prompt and the stop token, and the depth of each.

    A depth is the loop, counted from 1, whose state gave the token. `acceptance` says how the
    drafts fared, if there were any.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    acceptance: Acceptance | None = None


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    exit: str | None = None,
    kv: str = "full",
    loops: int | None = None,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    top_p: float = 1.0,
    top_k: int = 0,
    published_rounding: bool = False,
    on_token: OnToken | None = None,
    speculate: str | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens.

    Args:
      config, params: as `load_huggingface` gives them, or `decoding_params`, which spares every
        call but the first the copy of the weights.
      prompts: token ids; their lengths may differ.
      temperature: 0 takes the most probable token.
      exit: `static:2`, `q:0.8`, `hidden:0.05`, `confidence:0.9` or `lookahead:0.8` says which
        loop's state is read; the last loop's if None.
      kv: KV policy, a key of `KV_POLICIES`. With `full` all loops run whatever `exit` says, as in
        the published code (only `static` runs fewer); with the others nothing deeper is computed.
      loops: loops to run, any number from 1 on; `config.num_loops` if None.
      stop_ids: a row ends before the first of these; nothing else ends it early.
      seed: of the draws; row i draws the same tokens whatever the other rows are.
      top_p, top_k: draw from the fewest tokens that reach top_p, among the top_k; 0 is no limit.
      published_rounding: decide `q:…` in the rounding of the published code.
      on_token: called for every new token, in order within a row, for streaming.
      speculate: `2x3` drafts 3 tokens with 2 loops each and verifies them with the others at once:
        the same greedy answer, the same distribution of sampled ones. Not with `exit`.

    Raises ConfigError for an empty or over-long prompt, a token outside the vocabulary, and any
    setting out of its range.
    """
    if speculate is not None:
        return Generation(*speculative_generate(
            config, params, prompts, max_new_tokens, speculate,
            temperature=temperature, top_p=top_p, top_k=top_k, exit=exit, kv=kv, loops=loops,
            stop_ids=stop_ids, seed=seed, published_rounding=published_rounding, on_token=on_token,
        ))  # fmt: skip
    loops = config.num_loops if loops is None else loops
    settings = (temperature, top_p, top_k, seed)
    requests = [
        Request(prompt, max_new_tokens, *settings, row, exit, loops, frozenset(stop_ids))
        for row, prompt in enumerate(prompts)
    ]
    _check(config, requests, kv, loops, published_rounding)
    if kv == "full" and exit is not None and exit.startswith("static:"):
        loops = int(parse_exit_rule(exit).value)  # the cache need not hold what nothing reads
        requests = [replace(request, loops=loops) for request in requests]
    slots = min(len(prompts), MOST_SLOTS)
    window = max(len(prompt) for prompt in prompts) + max_new_tokens
    engine = Engine(config, params, kv, slots, window, loops, [slots], published_rounding)
    return _answer(engine, requests, on_token)


def _check(config, requests: Sequence[Request], kv: str, loops: int, published_rounding: bool):
    """Raises the ConfigErrors of `generate`; no parameters are needed to find a fault."""
    require(len(requests) > 0, "prompts", [], "at least one prompt")
    require_choice(kv, KV_POLICIES, "kv")
    require(loops >= 1, "loops", loops, "at least 1")
    window, exit = config.max_position_embeddings, requests[0].exit
    for row, request in enumerate(requests):
        check_prompt(config, request.prompt, request.max_new_tokens, window, f"prompt {row}")
        rule = check_request(config, request, window, loops)
        require(
            not published_rounding or (rule is not None and rule.kind == "q"), "exit", exit,
            "q:… with published_rounding, which concerns no other rule",
        )  # fmt: skip


def _answer(engine: Engine, requests: Sequence[Request], on_token: OnToken | None) -> Generation:
    rows = {engine.submit(request): row for row, request in enumerate(requests)}
    answer = Generation([[] for _ in rows], [[] for _ in rows])
    while not engine.idle:
        for update in engine.step():
            if (token := update.token) is not None:
                row = rows[update.request_id]
                answer.tokens[row].append(token.token)
                answer.depths[row].append(token.depth)
                if on_token is not None:
                    on_token(row, token.token, token.depth)
    return answer
