"""An engine without a model: tokens from a hash of the request, as fast or slow as asked."""

import hashlib
import itertools
import time

from ouro_jax.config import ModelConfig
from ouro_jax.inference.requests import LoopReadout, NewToken, Request, Update, check_request

CONFIG = ModelConfig(270, 32, 48, 2, 4, 4, 8, max_position_embeddings=256)


class FakeEngine:
    """The interface of `Engine`. `script`, if given, is the tokens of every answer."""

    def __init__(self, kv="full", slots=8, window=256, loops=4, seconds=0.0, script=None):
        self.config, self.kv, self.num_slots, self.window, self.loops = (
            CONFIG, kv, slots, window, loops,
        )  # fmt: skip
        self.seconds, self.script = seconds, script
        self.broken: Exception | None = None
        self.cancelled: list[int] = []
        self._numbers = itertools.count()
        self._live: dict[int, tuple[Request, int]] = {}
        self._waiting: dict[int, Request] = {}

    @property
    def idle(self):
        return not self._live and not self._waiting

    @property
    def live(self):
        return len(self._live)

    @property
    def waiting(self):
        return len(self._waiting)

    def submit(self, request):
        check_request(self.config, request, self.window, self.loops)
        number = next(self._numbers)
        self._waiting[number] = request
        return number

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self._live.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def step(self):
        if self.broken:
            raise self.broken
        time.sleep(self.seconds)
        while self._waiting and len(self._live) < self.num_slots:
            number = next(iter(self._waiting))
            self._live[number] = self._waiting.pop(number), 0
        updates = []
        for number, (request, count) in list(self._live.items()):
            updates.append(self._advance(number, request, count))
            if updates[-1].finish:
                del self._live[number]
            else:
                self._live[number] = request, count + 1
        return updates

    def _advance(self, number, request, count):
        token = self.token(request, count)
        if token in request.stop_ids:
            return Update(number, None, "stop")
        loops = request.loops or self.loops
        depth = 1 + (token + count) % loops
        readouts = tuple(
            LoopReadout((token + loop) % 270, 0.5, 1 / loops) for loop in range(loops)
        ) if request.readouts else ()  # fmt: skip
        alternatives = tuple(((token + i) % 270, -1.0 - i) for i in range(request.alternatives))
        new = NewToken(token, depth, -1.0, alternatives, readouts)
        return Update(number, new, "length" if count + 1 == request.max_new_tokens else None)

    def token(self, request, count):
        if self.script is not None:
            return self.script[count % len(self.script)]
        seed = (request.seed, request.stream) if request.temperature else 0
        text = repr((tuple(request.prompt), seed, count)).encode()
        return 3 + hashlib.sha256(text).digest()[0] % 250
