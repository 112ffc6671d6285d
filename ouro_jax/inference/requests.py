"""What is asked of the engine and what it answers: requests, new tokens, updates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError, require
from ouro_jax.model.exit import ExitRule, parse_exit_rule

MOST_ALTERNATIVES = 20

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
      prompt: token ids, at least one.
      max_new_tokens: tokens to add at most.
      temperature, top_p, top_k: as in `Sampling`.
      seed, stream: tokens are drawn from (seed, stream, index of the token) alone; requests that
        share a seed, as the choices of one prompt do, differ in `stream`.
      exit: as `parse_exit_rule` reads it; None runs and reads all loops.
      loops: loops to run, from 1 to the engine's; None: the engine's.
      stop_ids: the answer ends before the first of these.
      alternatives: how many most probable tokens to report with each new one, 0 … 20.
      readouts: whether to report what every loop that was run would have said.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stream: int = 0
    exit: str | None = None
    loops: int | None = None
    stop_ids: frozenset[int] = frozenset()
    alternatives: int = 0
    readouts: bool = False


@dataclass(frozen=True)
class LoopReadout:
    """What one loop of a token says: its most probable token, that one's probability, p(exit).

    `exit_probability` is p_t of the gate's exit distribution given what was seen: of the last loop
    that the request may run it is all that remains.
    """

    token: int
    probability: float
    exit_probability: float


@dataclass(frozen=True)
class NewToken:
    """A token of an answer. `depth` is the loop, from 1, whose state gave it.

    `logprob` is ln p(token) before temperature, top-k and top-p; `alternatives` the most probable
    tokens with theirs; `readouts` one for each loop that was run, empty unless asked for.
    """

    token: int
    depth: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    readouts: tuple[LoopReadout, ...] = ()


@dataclass(frozen=True)
class Update:
    """News of one request: a token, the end of the answer, or both at once."""

    request_id: int
    token: NewToken | None
    finish: Finish | None


def check_request(
    config: ModelConfig, request: Request, window: int, loops: int
) -> ExitRule | None:
    """The exit rule of a request that an engine of `window` positions and `loops` can answer.

    Raises ConfigError naming what is wrong: an empty or over-long prompt, a token outside the
    vocabulary, a setting out of its range.
    """
    check_prompt(config, request.prompt, request.max_new_tokens, window, "the prompt")
    require(
        0 <= request.temperature < float("inf"), "temperature", request.temperature,
        "0 or a positive number",
    )  # fmt: skip
    require(0 < request.top_p <= 1, "top_p", request.top_p, "more than 0 and at most 1")
    require(request.top_k >= 0, "top_k", request.top_k, "0 (no limit) or more")
    require(
        0 <= request.alternatives <= MOST_ALTERNATIVES, "alternatives", request.alternatives,
        f"0 to {MOST_ALTERNATIVES}",
    )  # fmt: skip
    most = loops if request.loops is None else request.loops
    require(1 <= most <= loops, "loops", request.loops, f"1 to {loops}")
    rule = None if request.exit is None else parse_exit_rule(request.exit)
    if rule is not None and rule.kind == "static":
        require(rule.value <= most, "exit", request.exit, f"at most the {most} loops that are run")
    return rule


def check_prompt(
    config: ModelConfig, prompt: Sequence[int], max_new_tokens: int, window: int, name: str
) -> None:
    """Raises ConfigError, calling the prompt `name`, if it cannot be continued so far."""
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    if len(prompt) == 0:
        raise ConfigError(f"{name} is empty: expected at least one token.")
    if len(prompt) + max_new_tokens > window:
        raise ConfigError(
            f"{name} has {len(prompt):,} tokens: with max_new_tokens = {max_new_tokens:,} that is "
            f"more than the window of {window:,} positions. Shorten the prompt or ask for fewer "
            "tokens."
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"{name} holds token {token}: expected 0 to {config.vocab_size - 1}, the model's "
                "vocabulary. Is it another model's tokenizer?"
            )


def beyond_training(config: ModelConfig, loops: int) -> str | None:
    """What to tell who asks for more loops than the model was trained with; None if it does not."""
    if loops <= config.num_loops:
        return None
    return (
        f"warning: loops = {loops}, and the model was trained with {config.num_loops}. The paper's "
        "models, trained with 4, lose by more: Ouro-1.4B has 67.45 on MMLU after 4 loops, 66.64 "
        "after 5 and 64.49 after 8 (Table 10)."
    )
