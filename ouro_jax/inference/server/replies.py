"""Pieces of answers in OpenAI's shapes, whole and as chunks of a stream.

Every choice of a request with `depths` has a key "ouro" with its tokens; every response has one
that says what was run.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from ouro_jax.inference.requests import Finish, NewToken
from ouro_jax.inference.server.answer import Piece
from ouro_jax.inference.server.job import Delta, Job
from ouro_jax.inference.text import INCOMPLETE, decode_text

Json = dict[str, Any]


class Reply:
    """The response to one request: `whole`, or `chunks` of a stream."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer):
        self._job, self._asked = job, job.asked
        self._tokenizer = tokenizer
        prefix = "chatcmpl" if self._asked.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._offsets = [0] * len(self._asked.requests)

    def whole(self, deltas: Sequence[Delta]) -> Json:
        """The response that has everything, from all deltas in their order."""
        pieces: list[list[Piece]] = [[] for _ in self._asked.requests]
        reasons: list[Finish | None] = [None] * len(pieces)
        for delta in deltas:
            pieces[delta.index] += delta.pieces
            reasons[delta.index] = delta.finish
        choices = []
        for index, (shown, reason) in enumerate(zip(pieces, reasons, strict=True)):
            text = "".join(piece.text for piece in shown)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._asked.chat
                else {"text": text}
            )
            choices.append(self._choice(Delta(index, shown, reason), content, ended=True))
        return self._response("", choices) | {"usage": self._usage()}

    def opening(self) -> Iterator[Json]:
        """The chunks before any text: who speaks, in each choice of a chat."""
        if self._asked.chat:
            for index in range(len(self._asked.requests)):
                delta = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk([self._choice(Delta(index, [], None), delta, ended=False)])

    def chunk(self, delta: Delta) -> Json:
        """The chunk that says what is new."""
        text = "".join(piece.text for piece in delta.pieces)
        content: Json = {"text": text}
        if self._asked.chat:
            content = {"delta": {"content": text} if delta.pieces else {}}
        return self._chunk([self._choice(delta, content, ended=delta.finish is not None)])

    def closing(self) -> Iterator[Json]:
        """The chunk after all text, if the client asked for the usage."""
        if self._asked.include_usage:
            yield self._response(".chunk", []) | {"usage": self._usage()}

    def _chunk(self, choices: list[Json]) -> Json:
        nothing = {"usage": None} if self._asked.include_usage else {}
        return self._response(".chunk", choices) | nothing

    def _response(self, suffix: str, choices: list[Json]) -> Json:
        kind = f"chat.completion{suffix}" if self._asked.chat else "text_completion"
        asked = self._asked
        ran = {"kv": asked.kv, "loops": asked.loops, "exit": asked.exit, "seed": asked.seed}
        return self._head | {"object": kind, "choices": choices, "ouro": ran}

    def _usage(self) -> Json:
        prompt = self._asked.prompt_tokens
        new = sum(answer.tokens for answer in self._job.answers)
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
        }  # fmt: skip

    def _choice(self, delta: Delta, content: Json, ended: bool) -> Json:
        choice = {"index": delta.index, "finish_reason": delta.finish, "logprobs": None} | content
        if self._asked.logprobs:
            choice["logprobs"] = self._logprobs(delta)
        if self._asked.depths:
            choice["ouro"] = {"tokens": [self._token(piece) for piece in delta.pieces]}
            if ended:
                choice["ouro"] |= self._saved(delta.index)
        return choice

    def _saved(self, index: int) -> Json:
        answer = self._job.answers[index]
        mean = answer.depths / answer.tokens if answer.tokens else None
        saved = None if mean is None else 1 - mean / self._asked.loops
        return {"mean_depth": mean, "saved_share": saved}

    def _token(self, piece: Piece) -> Json:
        token = piece.token
        return {
            "text": piece.text, "id": token.token, "depth": token.depth,
            "readouts": [
                {
                    "text": decode_text(self._tokenizer, [readout.token]), "id": readout.token,
                    "probability": _rounded(readout.probability),
                    "exit_probability": _rounded(readout.exit_probability),
                }
                for readout in token.readouts
            ],
        }  # fmt: skip

    def _logprobs(self, delta: Delta) -> Json:
        tokens = [piece.token for piece in delta.pieces]
        if self._asked.chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        offsets = []
        for piece in delta.pieces:
            offsets.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(piece.text)
        return {
            "tokens": [self._spelt(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._spelt(other): logprob for other, logprob in token.alternatives}
                for token in tokens
            ],
            "text_offset": offsets,
        }  # fmt: skip

    def _chat_logprob(self, token: NewToken) -> Json:
        return self._one(token.token, token.logprob) | {
            "top_logprobs": [self._one(other, logprob) for other, logprob in token.alternatives]
        }

    def _one(self, token: int, logprob: float) -> Json:
        text = decode_text(self._tokenizer, [token])
        return {
            "token": self._spelt(token), "logprob": logprob,
            # Of a part of a character the text has no bytes to tell.
            "bytes": None if INCOMPLETE in text else list(text.encode()),
        }  # fmt: skip

    def _spelt(self, token: int) -> str:
        """A token's text, or its number where the text would be that of other tokens too."""
        text = decode_text(self._tokenizer, [token])
        return f"token:{token}" if INCOMPLETE in text else text


def _rounded(probability: float) -> float:
    """Six digits: what is read by eye need not make a stream three times as long."""
    return round(probability, 6)
