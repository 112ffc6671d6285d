"""Self-speculative decoding: what the first loops draft, all loops verify, exactly.

B batch rows, L prompt positions, N = M + 1 positions of a round of M drafts.

The host asks for round after round until every row has ended; rows accept different numbers of
drafts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError, require
from ouro_jax.inference.requests import Request, check_prompt, check_request
from ouro_jax.inference.rounds import PREFILL_CHUNK, RoundProgram, play_round, read_prompts
from ouro_jax.inference.sampling import Sampling, row_keys
from ouro_jax.inference.slots import decoding_params

if TYPE_CHECKING:
    from ouro_jax.inference.generate import OnToken

# Prompts and caches have lengths of multiples of this, so that few lengths are compiled.
BUCKET = 64


@dataclass(frozen=True)
class Acceptance:
    """How the drafts fared, summed over the rows.

    `rounds` of a row gave `tokens` of its answer (the first token is the prompt's, not a round's).
    Drafts are `judged` up to the first that is refused; those behind it are not.
    """

    rounds: int
    tokens: int
    judged: int
    accepted: int

    @property
    def rate(self) -> float | None:
        """Accepted of the judged drafts, 0 … 1; None if there was none."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_round(self) -> float | None:
        """New tokens of a round, up to M + 1; None if there was no round."""
        return self.tokens / self.rounds if self.rounds else None


def parse_speculation(text: str, loops: int) -> tuple[int, int]:
    """Reads `2x3`: (2 loops for a draft, 3 drafts a round), for answers of `loops` loops.

    Raises ConfigError for another form, for no draft, and unless a draft has fewer loops than
    the answer and at least one.
    """
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    if match is None:
        numbers = re.findall(r"[0-9]+", text)
        hint = f" Did you mean {'x'.join(numbers)}?" if len(numbers) == 2 else ""
        raise ConfigError(
            f"speculate = {text!r}: expected SxM, as in 2x3: 2 loops for a draft, 3 drafts a "
            f"round.{hint}"
        )
    draft_loops, drafts = int(match[1]), int(match[2])
    require(loops > 1, "speculate", text, "nothing, as 1 loop is run: no draft has fewer")
    require(
        1 <= draft_loops < loops, "speculate", text,
        f"drafts of 1 to {loops - 1} loops, fewer than the {loops} that are run",
    )  # fmt: skip
    require(drafts >= 1, "speculate", text, "at least 1 draft a round")
    return draft_loops, drafts


def speculative_generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    speculate: str,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    exit: str | None,
    kv: str,
    loops: int | None,
    stop_ids: Sequence[int],
    seed: int,
    published_rounding: bool,
    on_token: "OnToken | None",
) -> tuple[list[list[int]], list[list[int]], Acceptance]:
    """Tokens and depths (all of them `loops`) of every row's answer, and how the drafts fared.

    Args:
      params: as in `generate`.
      speculate: `SxM`, see `parse_speculation`.
      the others: as in `generate`. Greedy answers are those of plain decoding, sampled ones have
        the same distribution but are other draws.

    Raises ConfigError for what `generate` refuses, for a wrong `speculate`, and for settings that
    it does not go with: an exit rule, a KV policy other than `full`, a window without room for M
    positions behind the answer.
    """
    loops = config.num_loops if loops is None else loops
    require(loops >= 1, "loops", loops, "at least 1")
    draft_loops, drafts = parse_speculation(speculate, loops)
    _check_company(speculate, exit, kv, published_rounding)
    _check_prompts(config, prompts, max_new_tokens, drafts, speculate)
    settings = Request(prompts[0], max_new_tokens, temperature, top_p, top_k)
    check_request(config, settings, config.max_position_embeddings, loops)

    params = decoding_params(config, params)
    prompts_BL, lengths_B = _padded(prompts)
    length = int(lengths_B.max()) + max_new_tokens + drafts
    num_slots = max(prompts_BL.shape[1], _multiple(length, BUCKET))
    program = RoundProgram(config, loops, draft_loops, drafts, num_slots)
    same_B = jnp.ones(len(prompts), jnp.int32)
    sampling = Sampling(same_B * jnp.float32(temperature), same_B * top_k, same_B * top_p)

    answers = _Answers(len(prompts), max_new_tokens, drafts, loops, frozenset(stop_ids), on_token)
    left_B = np.full(len(prompts), max_new_tokens - 1, np.int32)
    cache, rows = read_prompts(
        config, loops, num_slots, params, prompts_BL, lengths_B, left_B,
        row_keys(seed, len(prompts)), sampling,
    )  # fmt: skip
    answers.begin(jax.device_get(rows.tokens_B).tolist())
    # A round is not sent off before the last one is read: it would be one in vain at the end, and
    # a round is long beside the wait.
    while not answers.ended:
        cache, rows, outcome = play_round(program, params, cache, rows, sampling)
        outcome = jax.device_get(outcome)
        answers.add(outcome.tokens_BN.tolist(), outcome.accepted_B.tolist())
    return answers.tokens, [[loops] * len(row) for row in answers.tokens], answers.acceptance()


class _Answers:
    """Collects the rows' tokens on the host, each until its end, and passes them on."""

    def __init__(
        self,
        batch: int,
        max_new_tokens: int,
        drafts: int,
        loops: int,
        stop_ids: frozenset[int],
        on_token: "OnToken | None",
    ):
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._open = [True] * batch
        self._max_new_tokens = max_new_tokens
        self._drafts = drafts
        self._loops = loops
        self._stop_ids = stop_ids
        self._on_token = on_token
        self._rounds = self._kept = self._judged = self._accepted = 0

    @property
    def ended(self) -> bool:
        return not any(self._open)

    def begin(self, tokens: list[int]) -> None:
        """The first token of every row."""
        for row, token in enumerate(tokens):
            self._extend(row, [token])

    def add(self, tokens: list[list[int]], accepted: list[int]) -> None:
        """A round's drafts and the token after them; rows that have ended do not count."""
        for row, right in enumerate(accepted):
            if self._open[row]:
                self._rounds += 1
                self._judged += min(right + 1, self._drafts)
                self._accepted += right
                self._kept += self._extend(row, tokens[row][: right + 1])

    def acceptance(self) -> Acceptance:
        return Acceptance(self._rounds, self._kept, self._judged, self._accepted)

    def _extend(self, row: int, tokens: list[int]) -> int:
        """Adds what belongs to the row's answer, and says how much that was."""
        before = len(self.tokens[row])
        for token in tokens:
            if token in self._stop_ids:
                self._open[row] = False
                break
            self.tokens[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token, self._loops)
            if len(self.tokens[row]) == self._max_new_tokens:
                self._open[row] = False
                break
        return len(self.tokens[row]) - before


def _check_company(speculate: str, exit: str | None, kv: str, published_rounding: bool) -> None:
    """Refuses settings that have no meaning, or no exact one, beside `speculate`."""
    require(
        exit is None, "exit", exit,
        f"none with speculate = {speculate!r}, which reads the last loop's state of every token",
    )  # fmt: skip
    require(
        kv == "full", "kv", kv,
        f"full with speculate = {speculate!r}: only then does verifying go on where drafts ended",
    )  # fmt: skip
    require(
        not published_rounding, "published_rounding", published_rounding,
        f"False with speculate = {speculate!r}: it concerns exit rules of the kind q alone",
    )  # fmt: skip


def _check_prompts(config, prompts, max_new_tokens, drafts, speculate):
    """Raises ConfigError for prompts that cannot be continued, with room for a round's drafts."""
    require(len(prompts) > 0, "prompts", prompts, "at least one prompt")
    window = config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        check_prompt(config, prompt, max_new_tokens, window, f"prompt {index}")
        if len(prompt) + max_new_tokens + drafts > window:
            raise ConfigError(
                f"speculate = {speculate!r}: prompt {index} has {len(prompt):,} tokens; with "
                f"max_new_tokens = {max_new_tokens:,} and {drafts} drafts behind the last one that "
                f"is more than the model's window of {window:,} (max_position_embeddings). Draft "
                "less, ask for fewer tokens or leave speculate out."
            )


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts in one array, filled up on the right, and their lengths."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    length = _multiple(longest, BUCKET if longest <= PREFILL_CHUNK else PREFILL_CHUNK)
    prompts_BL = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BL[row, : len(prompt)] = prompt
    return prompts_BL, lengths_B


def _multiple(length: int, of: int) -> int:
    return -(-length // of) * of
