"""The answers that one HTTP request asked for, from the first slot asked for to the last freed.

All of it runs in the event loop's thread; the worker's thread only rings.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from ouro_jax.errors import ConfigError
from ouro_jax.inference.requests import Finish, Request
from ouro_jax.inference.server.answer import Answer, Piece
from ouro_jax.inference.server.errors import ApiError
from ouro_jax.inference.server.metrics import Metrics
from ouro_jax.inference.server.protocol import Asked, Served
from ouro_jax.inference.server.worker import News, Worker


class Delta(NamedTuple):
    """What is new of one choice: pieces that can be shown, and why it ended if it did."""

    index: int
    pieces: list[Piece]
    finish: Finish | None


class Desk:
    """Where answers are asked for: counts the open ones and refuses what is too much."""

    def __init__(self, served: Served, worker: Worker, metrics: Metrics, max_waiting: int):
        self.served, self.metrics = served, metrics
        self._worker = worker
        self._max_waiting = max_waiting
        self._open = dict.fromkeys(served.engines, 0)

    def open(self, asked: Asked) -> "Job":
        """Submits all that is asked for.

        Raises ApiError 429 if too many wait already, 400 if it could never be served, 503 if the
        engine broke.
        """
        if self._worker.failure is not None:
            raise broken()
        number = len(asked.requests)
        most = self.served.engines[asked.kv].num_slots + self._max_waiting
        if number > most:
            raise ApiError(
                400, f"n = {number} answers at once: expected at most {most} (slots and places to "
                "wait). Send fewer prompts or a smaller n.", "n", "invalid_value",
            )  # fmt: skip
        if self._open[asked.kv] + number > most:
            raise ApiError(
                429, f"{self._open[asked.kv]} answers are open and {number} more asked for: "
                f"expected at most {most} together. Try again later.", None, "too_many_waiting",
                {"Retry-After": "1"},
            )  # fmt: skip
        self._open[asked.kv] += number
        self.metrics.count("ouro_prompt_tokens_total", asked.prompt_tokens)
        return Job(self, self._worker, asked)

    def ended(self, kv: str, reason: str) -> None:
        """One answer of policy `kv` has ended."""
        self._open[kv] -= 1
        self.metrics.count("ouro_answers_total", reason=reason)

    def gauges(self) -> dict[str, dict[str, float]]:
        """Slots in use and open answers, for the metrics."""
        engines = self.served.engines.items()
        return {
            "ouro_slots": {kv: engine.num_slots for kv, engine in engines},
            "ouro_slots_live": {kv: engine.live for kv, engine in engines},
            "ouro_answers_open": dict(self._open),
        }

    @property
    def is_broken(self) -> bool:
        """Whether an engine broke: nothing is answered any more."""
        return self._worker.failure is not None


def broken() -> ApiError:
    """What clients are told when an engine broke; the server's own output has the cause."""
    return ApiError(503, "The engine failed; the server has to be restarted.", code="engine_failed")


class Job:
    """Open answers. `close` frees the slots of those that have not ended; call it always."""

    def __init__(self, desk: Desk, worker: Worker, asked: Asked):
        self.asked = asked
        self._desk, self._worker = desk, worker
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._last = [math.nan] * len(asked.requests)
        self.answers = [Answer(desk.served.tokenizer, asked.stops) for _ in asked.requests]
        self._tickets = {
            index: self._submit(index, request) for index, request in enumerate(asked.requests)
        }

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, choice by choice, until all have ended; ApiError if the engine breaks."""
        while self._tickets:
            index, news = await self._news.get()
            if index not in self._tickets:
                continue  # rung before the cancellation was heard
            if isinstance(news, Exception):
                self._end(index, "failed")
                if isinstance(news, ConfigError):
                    raise ApiError(400, str(news), code="invalid_value") from news
                raise broken() from news
            answer, finish = self.answers[index], news.finish
            pieces = []
            if news.token is not None:
                self._measure(index, news.token.depth)
                pieces += answer.push(news.token)
            if finish is not None and not answer.stopped:
                pieces += answer.finish()
            if answer.stopped:
                if finish is None:
                    self._worker.cancel(self._tickets[index])
                finish = "stop"
            if finish is not None:
                self._end(index, finish)
            if pieces or finish:
                yield Delta(index, pieces, finish)

    def close(self) -> None:
        """Cancels whatever has not ended."""
        for index, ticket in list(self._tickets.items()):
            self._worker.cancel(ticket)
            self._end(index, "cancelled")

    def _end(self, index: int, reason: str) -> None:
        del self._tickets[index]
        self._desk.ended(self.asked.kv, reason)

    def _submit(self, index: int, request: Request) -> int:
        def ring(news: News) -> None:
            # A loop that has closed has nobody left who waits.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

        return self._worker.submit(self.asked.kv, request, ring)

    def _measure(self, index: int, depth: int) -> None:
        now, metrics = time.perf_counter(), self._desk.metrics
        metrics.count("ouro_generated_tokens_total", depth=depth)
        if math.isnan(self._last[index]):
            metrics.observe("ouro_first_token_seconds", now - self._began)
        else:
            metrics.observe("ouro_token_seconds", now - self._last[index])
        self._last[index] = now
