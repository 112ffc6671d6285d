"""The routes. What they answer is JSON, errors too, but for the page, the metrics and streams."""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ouro_jax.inference.server.errors import ApiError
from ouro_jax.inference.server.job import Desk, broken
from ouro_jax.inference.server.metrics import Metrics
from ouro_jax.inference.server.openapi import document
from ouro_jax.inference.server.protocol import Asked, Served, read_chat, read_completion
from ouro_jax.inference.server.replies import Reply
from ouro_jax.inference.server.schema import read_json
from ouro_jax.inference.server.stream import ClientGone, EventStream, out_of_time, whole
from ouro_jax.inference.server.worker import Worker

# Paths that say nothing about anybody's texts: a browser and a load balancer have no key.
OPEN_PATHS = ("/", "/health")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
Reader = Callable[[Mapping[str, Any], Served], Asked]


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server; an empty `api_key` lets everyone in."""

    max_body_bytes: int = 4 << 20
    max_waiting: int = 64
    timeout_seconds: float = 600.0
    api_key: str = ""


def make_app(
    served: Served, limits: Limits, failed: Callable[[Exception], None] = lambda error: None
) -> Starlette:
    """The ASGI application; its lifespan starts and ends the worker thread.

    `failed` is called, in that thread, with the error of an engine that broke.
    """
    worker = Worker(served.engines, failed)
    metrics = Metrics()
    routes = _Routes(served, limits, Desk(served, worker, metrics, limits.max_waiting), metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette):
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.show_metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        ],
        middleware=[Middleware(_Gate, key=limits.api_key, metrics=metrics)],
        exception_handlers={
            ApiError: _told,
            HTTPException: _no_route,
            ClientGone: _gone,
            ClientDisconnect: _gone,
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )


class _Gate:
    """Asks for the key before anything is read, and counts what was answered."""

    def __init__(self, app: ASGIApp, key: str, metrics: Metrics):
        self._app, self._metrics = app, metrics
        self._expected = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route is set once it is found; other paths are anybody's invention.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.count(
                    "ouro_http_requests_total", route=route, status=message["status"]
                )
            await send(message)

        app = self._app if self._admits(scope) else _no_key().response()
        await app(scope, receive, counted)

    def _admits(self, scope: Scope) -> bool:
        if not self._expected or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)


class _Routes:
    """The endpoints, which share a model, a desk and the counters."""

    def __init__(self, served: Served, limits: Limits, desk: Desk, metrics: Metrics):
        self._served, self._limits, self._desk, self._metrics = served, limits, desk, metrics
        self._page = (
            resources.files("ouro_jax.inference.server").joinpath("page.html").read_text("utf-8")
        )
        self._document = document(served)
        self._created = int(time.time())

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        if self._desk.is_broken:
            raise broken()
        return JSONResponse({"status": "ok", "model": self._served.name})

    async def show_metrics(self, request: Request) -> Response:
        text = self._metrics.text(self._desk.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._served.name:
            raise ApiError(
                404, f"model {name[:80]!r}: expected {self._served.name!r}, the one served.",
                "model", "model_not_found",
            )  # fmt: skip
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _answer(self, request: Request, read: Reader) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.timeout_seconds
        try:
            async with asyncio.timeout_at(deadline):
                body = await _read_body(request, self._limits.max_body_bytes)
        except TimeoutError as error:
            raise ApiError(
                408, "The body did not arrive within the server's time limit.", code="timeout"
            ) from error
        # A long text takes a while to become tokens; others should not wait for it.
        asked = await asyncio.to_thread(lambda: read(read_json(body), self._served))
        if asyncio.get_running_loop().time() >= deadline:
            raise out_of_time()
        job = self._desk.open(asked)
        reply = Reply(job, self._served.name, self._served.tokenizer)
        if asked.stream:
            return EventStream(job, reply, deadline)
        return JSONResponse(await whole(job, reply, request.receive, deadline))

    def _model(self) -> dict[str, Any]:
        served = self._served
        engines = served.engines.items()
        return {
            "id": served.name, "object": "model", "created": self._created, "owned_by": "ouro_jax",
            "ouro": {
                "kv": {
                    kv: {"loops": engine.loops, "window": engine.window, "slots": engine.num_slots}
                    for kv, engine in engines
                },
                "trained_loops": served.engines[served.default_kv].config.num_loops,
                "exit": served.exit, "chat": served.can_chat,
            },
        }  # fmt: skip


async def _read_body(request: Request, most: int) -> bytes:
    """The body; ApiError 415 if it is not called JSON, 413 if it is more than `most` bytes.

    That JSON has to be called so keeps other web pages out: a browser asks before it sends that.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"Content-Type = {kind[:80]!r}: expected application/json.", code="invalid_type"
        )
    too_large = ApiError(
        413, f"The body is larger than {most:,} bytes (--max_body_bytes).", code="body_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


def _no_key() -> ApiError:
    return ApiError(
        401, "Wrong or missing key: expected the header Authorization: Bearer KEY.",
        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    words = {
        404: f"There is no {path}: /openapi.json says what there is.",
        405: f"{request.method[:20]} is not for {path}: expected "
        f"{(error.headers or {}).get('Allow', 'another method')}.",
    }
    message = words.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    # Nobody reads this; 499 is what counters of nginx call it.
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "The server failed to answer; its output says why.").response()
