"""`generate`: prompts in, new tokens and the depth of each out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError, require, require_choice
from ouro_jax.inference.decode import PREFILL_CHUNK, Program, Rows, cast_params, decode, prefill
from ouro_jax.inference.sampling import Sampling, row_keys
from ouro_jax.model.exit import parse_exit_rule

KV_POLICIES = ("full", "last", "first", "mean", "exited")
# Prompts and caches are padded to multiples of this many positions, so that a program is compiled
# once per 64 lengths and not for each.
BUCKET = 64

OnToken = Callable[[int, list[int | None], list[int | None]], None]
"""(step from 0, token of each row, depth of each row); None for rows that have ended."""


@dataclass(frozen=True)
class Generation:
    """New tokens of each prompt, without the prompt and the stop token, and the depth of each.

    A depth is the loop, counted from 1, whose state gave the token.
    """

    tokens: list[list[int]]
    depths: list[list[int]]


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
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens.

    Args:
      config, params: as `load_huggingface` gives them.
      prompts: token ids; their lengths may differ.
      temperature: 0 takes the most probable token.
      exit: `static:2`, `q:0.8`, `hidden:0.05` or `confidence:0.9` says which loop's state is read;
        the last loop's if None. Only `static` runs fewer loops: with `kv="full"` the others write
        the keys and values of all loops, as the published code does.
      kv: KV policy; this version has `full`: every loop reads what the same loop wrote.
      loops: loops to run, any number from 1 on; `config.num_loops` if None.
      stop_ids: a row ends before the first of these; nothing else ends it early.
      seed: of the draws; row i draws the same tokens whatever the other rows are.
      top_p, top_k: draw from the fewest tokens that reach top_p, among the top_k; 0 is no limit.
      published_rounding: decide `q:…` in the rounding of the published code.
      on_token: called after every step, one step late, for streaming.

    Raises ConfigError for an empty or over-long prompt, a token outside the vocabulary, and any
    setting out of its range.
    """
    _check_prompts(config, prompts, max_new_tokens)
    _check_sampling(temperature, top_p, top_k)
    program = _program(config, prompts, max_new_tokens, exit, kv, loops, published_rounding)
    sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    answers = _Answers(len(prompts), frozenset(stop_ids), on_token)

    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    prompts_BL = np.zeros((len(prompts), _padded(max(lengths_B))), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BL[row, : len(prompt)] = prompt
    params = cast_params(config, params)
    cache, rows = prefill(
        program, params, prompts_BL, lengths_B, row_keys(seed, len(prompts)), sampling
    )
    for _ in range(max_new_tokens - 1):
        # The next step is under way while the host looks at this one's tokens.
        cache, following = decode(program, params, cache, rows, sampling)
        answers.add(rows)
        rows = following
        if answers.ended:
            break
    else:
        answers.add(rows)
    return Generation(answers.tokens, answers.depths)


class _Answers:
    """Collects the rows' tokens on the host until each meets a stop id."""

    def __init__(self, batch: int, stop_ids: frozenset[int], on_token: OnToken | None):
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.depths: list[list[int]] = [[] for _ in range(batch)]
        self._open = [True] * batch
        self._stop_ids = stop_ids
        self._on_token = on_token
        self._step = 0

    @property
    def ended(self) -> bool:
        return not any(self._open)

    def add(self, rows: Rows) -> None:
        tokens, depths = (x.tolist() for x in jax.device_get((rows.tokens_B, rows.depths_B)))
        for row, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
            self._open[row] = self._open[row] and token not in self._stop_ids
            if self._open[row]:
                self.tokens[row].append(token)
                self.depths[row].append(depth)
            else:
                tokens[row] = depths[row] = None
        if self._on_token and not self.ended:
            self._on_token(self._step, tokens, depths)
        self._step += 1


def _program(config, prompts, max_new_tokens, exit, kv, loops, published_rounding) -> Program:
    rule = None if exit is None else parse_exit_rule(exit)
    require_choice(kv, KV_POLICIES, "kv")
    require(kv == "full", "kv", kv, "full, the one KV policy that this version decodes with")
    loops = config.num_loops if loops is None else loops
    require(loops >= 1, "loops", loops, "at least 1")
    require(
        not published_rounding or (rule is not None and rule.kind == "q"), "exit", exit,
        "q:… with published_rounding, which concerns no other rule",
    )  # fmt: skip
    if rule is not None and rule.kind == "static":
        require(rule.value <= loops, "exit", exit, f"at most the {loops} loops that are run")
        loops = int(rule.value)
    longest = max(len(prompt) for prompt in prompts)
    num_slots = max(_padded(longest), _multiple(longest + max_new_tokens, BUCKET))
    return Program(config, loops, rule, published_rounding, num_slots)


def _padded(length: int) -> int:
    """Positions a prompt is padded to: whole chunks beyond the first."""
    return _multiple(length, BUCKET if length <= PREFILL_CHUNK else PREFILL_CHUNK)


def _multiple(length: int, of: int) -> int:
    return -(-length // of) * of


def _check_prompts(config: ModelConfig, prompts, max_new_tokens: int) -> None:
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(len(prompts) > 0, "prompts", prompts, "at least one prompt")
    window = config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {index} is empty: expected at least one token.")
        if len(prompt) + max_new_tokens > window:
            raise ConfigError(
                f"prompt {index} has {len(prompt):,} tokens: with max_new_tokens = "
                f"{max_new_tokens:,} that is more than the model's window of {window:,} "
                "(max_position_embeddings). Shorten the prompt or ask for fewer tokens."
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ConfigError(
                    f"prompt {index} holds token {token}: expected 0 to {config.vocab_size - 1}, "
                    "the model's vocabulary. Is it another model's tokenizer?"
                )


def _check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    require(0 <= temperature < float("inf"), "temperature", temperature, "0 or a positive number")
    require(0 < top_p <= 1, "top_p", top_p, "more than 0 and at most 1")
    require(top_k >= 0, "top_k", top_k, "0 (no limit) or more")
