"""The one thread that drives the engines: takes commands from a queue, passes updates on.

Engines are not thread safe, and a step blocks; so nobody else calls them. With several KV policies
the engines that have work take steps in turn.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Mapping

from ouro_jax.errors import ConfigError
from ouro_jax.inference.requests import Request, Update
from ouro_jax.inference.server.protocol import EngineLike

News = Update | Exception
Listener = Callable[[News], None]


class Worker:
    """A thread with the engines, by KV policy.

    A listener is called in this thread, with every update of its request or with the exception
    that ends it. `failed` gets the error of an engine that broke; all its requests, and all later
    ones, get it too: what a step leaves behind when it breaks is not known.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineLike],
        failed: Callable[[Exception], None] = lambda error: None,
    ):
        self._engines = engines
        self._failed = failed
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets = itertools.count(1)
        # Both sides of a live request: ticket → engine's number, and back to who listens.
        self._numbers: dict[int, tuple[str, int]] = {}
        self._listeners: dict[tuple[str, int], tuple[int, Listener]] = {}
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its current step; requests still open hear no more."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, kv: str, request: Request, listener: Listener) -> int:
        """Asks the engine of policy `kv`; returns the ticket to cancel with. Any thread may."""
        ticket = next(self._tickets)
        self._commands.put(lambda: self._submit(ticket, kv, request, listener))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Frees the slot of a request; nothing happens if it has ended. Any thread may."""
        self._commands.put(lambda: self._cancel(ticket))

    def _run(self) -> None:
        while True:
            busy = any(not engine.idle for engine in self._engines.values())
            try:
                command = self._commands.get(block=self.failure is not None or not busy)
            except queue.Empty:
                command = self._step
            if command is None:
                return
            try:
                command()
            except Exception as error:  # whatever broke, those who wait have to hear of it
                self._fail(error)

    def _submit(self, ticket: int, kv: str, request: Request, listener: Listener) -> None:
        if self.failure is not None:
            listener(self.failure)
            return
        try:
            number = self._engines[kv].submit(request)
        except Exception as error:
            listener(error)
            if not isinstance(error, ConfigError):
                raise
            return
        self._numbers[ticket] = kv, number
        self._listeners[kv, number] = ticket, listener

    def _cancel(self, ticket: int) -> None:
        if ticket in self._numbers:
            kv, number = self._numbers.pop(ticket)
            del self._listeners[kv, number]
            self._engines[kv].cancel(number)

    def _step(self) -> None:
        for kv, engine in self._engines.items():
            if engine.idle:
                continue
            for update in engine.step():
                ticket, listener = self._listeners[kv, update.request_id]
                if update.finish is not None:
                    del self._listeners[kv, update.request_id], self._numbers[ticket]
                listener(update)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for _, listener in self._listeners.values():
            listener(error)
        self._listeners.clear()
        self._numbers.clear()
        self._failed(error)
