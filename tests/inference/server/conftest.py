"""A live server on a fake engine, in a thread of the test process."""

import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fake_engine import FakeEngine

from ouro_jax.data.tokenizer import train_tokenizer
from ouro_jax.inference.server.app import Limits, make_app
from ouro_jax.inference.server.protocol import Served


@pytest.fixture(scope="session")
def tokenizer():
    """270 entries: three special ones, the bytes, and a few merges."""
    return train_tokenizer(["the cat sat on the mat\n" * 20], 270)


@pytest.fixture(scope="session")
def serve(tokenizer):
    """`with serve(engine, …) as client`: an httpx client of a live server with those engines."""

    @contextmanager
    def start(*engines: FakeEngine, limits: Limits | None = None):
        served = Served(
            "tiny", tokenizer, {engine.kv: engine for engine in engines}, None, frozenset({0, 2}),
            True,
        )  # fmt: skip
        app = make_app(served, limits or Limits())
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()

    return start


@pytest.fixture(scope="session")
def client(serve):
    """A server with two KV policies and fast engines, shared by tests that only ask."""
    with serve(FakeEngine("exited"), FakeEngine("full", loops=6)) as client:
        yield client


def slots_live(client) -> int:
    """Slots in use, of all policies, as the metrics say."""
    lines = client.get("/metrics").text.splitlines()
    return sum(
        int(float(line.split()[1]))
        for line in lines
        if line.startswith(("ouro_slots_live{", "ouro_answers_open{"))
    )


@pytest.fixture(scope="session")
def until_free():
    """Waits until the server holds no slot; fails after five seconds."""

    def wait(client):
        end = time.time() + 5
        while (live := slots_live(client)) and time.time() < end:
            time.sleep(0.01)
        assert live == 0

    return wait
