"""A looped model as lm-evaluation-harness sees it: likelihoods and answers at any depth.

The one module that is a subclass of what lm-eval brings: importing it needs the extra `eval`.
"""

import logging
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ouro_jax.config import ModelConfig
from ouro_jax.data.tokenizer import encode, end_of_text_id
from ouro_jax.errors import ConfigError, require, require_choice
from ouro_jax.experiments.scoring import BATCH_TOKENS, Pair, depth_settings, score
from ouro_jax.inference.engine import Engine
from ouro_jax.inference.requests import Request
from ouro_jax.inference.server.answer import Answer
from ouro_jax.inference.slots import decoding_params
from ouro_jax.model.cache import KV_POLICIES

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(
        f"Standard benchmarks need lm-evaluation-harness ({error}): "
        "run pip install 'ouro_jax[eval]'."
    ) from error

# It tells at length which settings of a task are overridden; the records say what was run.
logging.getLogger("lm_eval").setLevel(logging.ERROR)

MOST_NEW_TOKENS = 256  # what the harness's own models allow where a task does not say
# What tasks call the length of an answer, the first that is there counts.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessLM(TemplateLM):
    """Answers the three questions of the harness with a LoopLM.

    A context and its continuation are encoded together, with the context's trailing spaces on the
    continuation's side; an empty context is the end-of-text token; a context that does not fit is
    cut on the left: all as the harness's own models do.

    Args:
      config, params: as `load_huggingface` gives them.
      tokenizer: as `load_tokenizer` reads it. Texts are taken literally.
      loops: loops to run; `config.num_loops` if None.
      exit: as `parse_exit_rule` reads it; None reads the last loop.
      kv: KV policy of generated tokens. Likelihoods come from a full forward, which is `full`.
      window: positions of a row; `config.max_position_embeddings` if None.
      batch_tokens: positions of a batch of likelihoods.
      slots: answers generated at once.
      seed: of sampled answers; greedy ones do not depend on it.

    Raises ConfigError for a setting out of its range.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        *,
        loops: int | None = None,
        exit: str | None = None,
        kv: str = "full",
        window: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        slots: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        depth_settings(config, loops, exit)
        require_choice(kv, KV_POLICIES, "kv")
        longest = config.max_position_embeddings
        window = longest if window is None else window
        require(2 <= window <= longest, "window", window, f"2 to the model's {longest:,}")
        self._config, self._params, self._text = config, params, tokenizer
        self.loops = config.num_loops if loops is None else loops
        self.exit, self.kv, self.max_length = exit, kv, window
        self._batch_tokens, self._slots, self._seed = batch_tokens, slots, seed
        # Weights in the layout of decoding are a copy on CPU: made when they are first needed.
        self._decoding: Any = None
        self._depths, self._tokens = 0, 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; also what stands before a text without a context."""
        return end_of_text_id(self._text)

    def take_mean_depth(self) -> float | None:
        """Mean depth of the tokens scored or generated since the last call; None if none were."""
        mean = self._depths / self._tokens if self._tokens else None
        self._depths, self._tokens = 0, 0
        return mean

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of `string`, literally; nothing is ever added."""
        return encode(self._text, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text, in windows that share no scored token; 0 of an empty one.

        The first window begins with the end-of-text token, the others with the token before them;
        the last one is filled up with context, as far back as the window allows.
        """
        pairs: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.eot_token_id, self.max_length, context_len=1
            )
            pairs += map(make_disjoint_window, windows)
            owners += [index] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[index] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to the first of its stop strings, which is left out.

        Greedy unless the task samples (`do_sample`, `temperature`, `top_p`, `top_k`). An answer
        also ends at the end-of-text token.
        """
        asked = [self._request(row, *request.args) for row, request in enumerate(requests)]
        if not asked:
            return []
        window = max(len(request.prompt) + request.max_new_tokens for request, _ in asked)
        slots = min(self._slots, len(asked))
        if self._decoding is None:
            self._decoding = decoding_params(self._config, self._params)
        engine = Engine(self._config, self._decoding, self.kv, slots, window, self.loops, [slots])
        rows = {engine.submit(request): row for row, (request, _) in enumerate(asked)}
        answers = [Answer(self._text, stops) for _, stops in asked]
        texts = [""] * len(asked)
        with tqdm(total=len(asked), desc="answers", disable=disable_tqdm or None) as bar:
            while not engine.idle:
                for update in engine.step():
                    row = rows[update.request_id]
                    if answers[row].stopped:
                        continue  # said before the cancellation was heard
                    texts[row] += self._follow(engine, answers[row], update)
                    bar.update(update.finish is not None or answers[row].stopped)
        self._depths += sum(answer.depths for answer in answers)
        self._tokens += sum(answer.tokens for answer in answers)
        return texts

    def _follow(self, engine: Engine, answer: Answer, update: Any) -> str:
        """The text that an update adds to an answer; a stop string ends its request."""
        pieces = [] if update.token is None else answer.push(update.token)
        if update.finish is not None and not answer.stopped:
            pieces += answer.finish()
        if answer.stopped and update.finish is None:
            engine.cancel(update.request_id)
        return "".join(piece.text for piece in pieces)

    def _request(self, row: int, context: str, asked: dict[str, Any]) -> tuple[Request, list[str]]:
        """What the engine is asked, and the strings that end the answer."""
        until = asked.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        lengths = [asked[name] for name in LENGTH_NAMES if asked.get(name) is not None]
        most = int(lengths[0]) if lengths else MOST_NEW_TOKENS
        require(
            1 <= most < self.max_length, "max_gen_toks", most,
            f"1 to {self.max_length - 1:,}: the window has {self.max_length:,} positions",
        )  # fmt: skip
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-(self.max_length - most) :]
        sampled = asked.get("do_sample", True)
        request = Request(
            prompt, most,
            temperature=float(asked.get("temperature", 0.0)) if sampled else 0.0,
            top_p=float(asked.get("top_p", 1.0)), top_k=int(asked.get("top_k", 0)),
            seed=self._seed, stream=row, exit=self.exit, loops=self.loops,
            stop_ids=frozenset([self.eot_token_id]),
        )  # fmt: skip
        return request, stops

    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm or None) as bar:
            scores = score(
                self._config, self._params, pairs, self.loops, self.exit, self.max_length,
                self._batch_tokens, bar.update,
            )  # fmt: skip
        self._depths += sum(found.depth for found in scores)
        self._tokens += sum(len(continuation) for _, continuation in pairs)
        return [(found.logprob, found.greedy) for found in scores]
