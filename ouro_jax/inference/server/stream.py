"""Sending an answer while it grows, and noticing that the client has left."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ouro_jax.inference.server.errors import ApiError
from ouro_jax.inference.server.job import Job
from ouro_jax.inference.server.replies import Reply

T = TypeVar("T")
# For the last words to a client that may have stopped reading.
LAST_WORDS_SECONDS = 5.0


class ClientGone(Exception):
    """The client closed the connection: nobody reads what would be sent."""


def out_of_time() -> ApiError:
    """What is said when an answer takes longer than the server allows."""
    return ApiError(
        504, "The answer was not complete within the server's time limit (--timeout_seconds). Ask "
        "for fewer tokens or stream.", code="timeout",
    )  # fmt: skip


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; ClientGone, and `work` cancelled, if the client leaves before that."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(job: Job, reply: Reply, receive: Receive, deadline: float) -> dict[str, Any]:
    """The complete response; ApiError 504 at the deadline (on the loop's clock)."""

    async def collect() -> list:
        return [delta async for delta in job.deltas()]

    try:
        async with asyncio.timeout_at(deadline):
            return reply.whole(await while_connected(receive, collect()))
    except TimeoutError as error:
        raise out_of_time() from error
    finally:
        job.close()


class EventStream(Response):
    """The answer as server-sent events, ended by `[DONE]` or by an event with an error."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, reply: Reply, deadline: float):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job, self._reply, self._deadline = job, reply, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it all; frees the slots when the client leaves."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await while_connected(receive, self._events(send))
        except ClientGone:
            pass
        finally:
            self._job.close()

    async def _events(self, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                for chunk in self._reply.opening():
                    await send(_event(chunk))
                async for delta in self._job.deltas():
                    await send(_event(self._reply.chunk(delta)))
                for chunk in self._reply.closing():
                    await send(_event(chunk))
                last = b"data: [DONE]\n\n"
        except TimeoutError:
            last = _event(out_of_time().body())["body"]
        except ApiError as error:
            last = _event(error.body())["body"]
        # Before the last words: they may have to wait for the client, and slots should not.
        self._job.close()
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(value: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
