"""The engine: a fixed set of slots in which requests are answered, each token as deep as it needs.

Requests wait in turn, are read piece by piece beside the decoding of others, join a free slot at
loop 0 and leave it when they end. What a slot still holds of an earlier conversation is not read
again.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.errors import require, require_choice
from ouro_jax.inference.requests import (
    Finish,
    LoopReadout,
    NewToken,
    Request,
    Update,
    check_request,
)
from ouro_jax.inference.sampling import Sampling, row_key
from ouro_jax.inference.slots import (
    NO_RULE,
    PIECES,
    RULE_CODES,
    Asked,
    Program,
    Report,
    decoding_params,
    empty_slots,
    leave_slot,
    read_piece,
    step,
    take_slot,
)
from ouro_jax.model.cache import KV_POLICIES, PER_LOOP, empty_cache
from ouro_jax.model.exit import ExitRule

PIECE = PIECES[-1]
# Fewer tokens than this are as quickly read as looked for.
REUSED_AT_LEAST = 16


@dataclass
class _Answer:
    """A request on its way: its slot once it has one, how much of it has been read and said."""

    id: int
    request: Request
    rule: ExitRule | None
    loops: int
    slot: int = -1
    read: int = 0
    said: list[int] = field(default_factory=list)
    ended: bool = False


class Engine:
    """Answers requests in `slots` slots of `window` positions each, all of one KV policy.

    Args:
      config, params: as `load_huggingface` gives them.
      kv: KV policy, a key of `KV_POLICIES`. With `full` all loops run for every token, as the
        published code does; with the others a token that leaves early is not computed further.
      slots: requests answered at once.
      window: positions of a request, prompt and answer; `config.max_position_embeddings` if None.
      loops: the most loops a request may run; `config.num_loops` if None.
      widths: how many slots, from the first, a step may be compiled for; the fewest that hold all
        live ones is taken. Powers of two and all slots if None.
      published_rounding: decide `q:…` in the rounding of the published code.

    Not thread safe. Raises ConfigError for a setting out of its range.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        kv: str = "full",
        slots: int = 8,
        window: int | None = None,
        loops: int | None = None,
        widths: Sequence[int] | None = None,
        published_rounding: bool = False,
    ):
        require_choice(kv, KV_POLICIES, "kv")
        require(slots >= 1, "slots", slots, "at least 1")
        self.config, self.kv, self.num_slots = config, kv, slots
        self.window = config.max_position_embeddings if window is None else window
        require(
            1 <= self.window <= config.max_position_embeddings, "window", window,
            f"1 to the model's {config.max_position_embeddings:,} (max_position_embeddings)",
        )  # fmt: skip
        self.loops = config.num_loops if loops is None else loops
        require(self.loops >= 1, "loops", self.loops, "at least 1")
        self._widths = _powers_of_two(slots) if widths is None else sorted(widths)
        self._program = Program(config, self.loops, published_rounding)
        self._params = decoding_params(config, params)
        # The last slot is where nobody's writes go; the piece before it takes a prompt's padding.
        positions = -(-self.window // PIECE) * PIECE + PIECE
        self._parked = positions - 1
        self._cache = empty_cache(config, slots, positions, self.loops, kv)
        self._scratch = None if kv in PER_LOOP else empty_cache(config, 1, positions, self.loops)
        self._slots = empty_slots(self._program, slots, self._parked)
        self._ids = itertools.count()
        self._waiting: deque[_Answer] = deque()
        self._reading: _Answer | None = None
        self._holders: list[_Answer | None] = [None] * slots
        # What a free slot's cache holds of every loop, and of how many loops.
        self._kept: list[tuple[list[int], int]] = [([], 0) for _ in range(slots)]
        self._reports: deque[tuple[list[_Answer | None], Report, bool]] = deque()

    @property
    def live(self) -> int:
        """Slots that are taken, by prompts being read too."""
        return sum(holder is not None for holder in self._holders)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.live == self.waiting == 0

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; ConfigError if it cannot be answered."""
        rule = check_request(self.config, request, self.window, self.loops)
        loops = self.loops if request.loops is None else request.loops
        if rule is not None and rule.kind == "static" and self.kv == "full":
            loops = int(rule.value)  # nothing reads deeper loops
        answer = _Answer(next(self._ids), request, rule, loops)
        self._waiting.append(answer)
        return answer.id

    def cancel(self, request_id: int) -> None:
        """Ends a request without another update; one that has ended already is left alone."""
        for answer in (*self._waiting, *self._holders):
            if answer is not None and answer.id == request_id:
                self._end(answer)

    def step(self) -> list[Update]:
        """Reads a piece of a prompt, if one waits, and runs one loop of all live slots.

        Returns what came of the step before: the device is at work while the host looks at it.
        """
        pending = len(self._reports)
        self._read_a_piece()
        if any(holder and holder is not self._reading for holder in self._holders):
            self._run_a_loop()
        elif self._reading is None:
            pending = len(self._reports)
        return [update for _ in range(pending) for update in self._news()]

    def _read_a_piece(self) -> None:
        if self._reading is None and not self._start():
            return
        answer = self._reading
        assert answer is not None
        prompt, start = answer.request.prompt, answer.read
        rest = len(prompt) - start
        size = next((size for size in PIECES if size <= rest), PIECE)
        tokens_1C = np.zeros((1, size), np.int32)
        tokens_1C[0, : min(size, rest)] = prompt[start : start + size]
        last = min(size, rest) - 1
        in_place = self._scratch is None
        row = answer.slot if in_place else 0
        cache, seen = read_piece(
            self._program, self._params, self._cache if in_place else self._scratch, tokens_1C,
            _one(row), _one(start), _one(last), np.int32(answer.loops),
        )  # fmt: skip
        if in_place:
            self._cache = cache
        else:
            self._scratch = cache
        answer.read += last + 1
        if answer.read == len(prompt):
            self._join(answer, seen)
            self._reading = None

    def _start(self) -> bool:
        """Gives the next request the free slot that holds most of it; False if there is none."""
        free = [slot for slot, holder in enumerate(self._holders) if holder is None]
        if not self._waiting or not free:
            return False
        answer = self._waiting.popleft()
        shared = {slot: self._shared(slot, answer) for slot in free}
        answer.slot = max(free, key=lambda slot: (shared[slot], -slot))
        answer.read = shared[answer.slot]
        self._kept[answer.slot] = ([], 0)
        self._holders[answer.slot] = self._reading = answer
        return True

    def _shared(self, slot: int, answer: _Answer) -> int:
        """Tokens at the start of a prompt whose keys and values the slot holds; not the last."""
        tokens, loops = self._kept[slot]
        if loops < answer.loops:
            return 0
        pairs = zip(tokens, answer.request.prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return shared if shared >= REUSED_AT_LEAST else 0

    def _join(self, answer: _Answer, seen: tuple[jax.Array, jax.Array]) -> None:
        request = answer.request
        self._cache, self._slots, report = take_slot(
            self._program, self._params, self._cache, self._slots, self._scratch, seen,
            np.int32(answer.slot), np.int32(len(request.prompt)), np.int32(request.max_new_tokens),
            row_key(request.seed, request.stream), _asked(answer),
        )  # fmt: skip
        self._reports.append(([answer], report, True))

    def _run_a_loop(self) -> None:
        last = max(
            slot for slot, holder in enumerate(self._holders)
            if holder is not None and holder is not self._reading
        )  # fmt: skip
        width = next(width for width in self._widths if width > last)
        self._cache, self._slots, report = step(
            self._program, self._params, self._cache, self._slots, width
        )
        self._reports.append((self._holders[:width], report, False))

    def _news(self) -> list[Update]:
        """The updates of the oldest report; of requests that have ended since, none."""
        holders, report, is_first = self._reports.popleft()
        report = jax.device_get(report)
        return [
            self._tell(answer, report, index, is_first)
            for index, answer in enumerate(holders)
            if report.finished_B[index] and answer is not None and not answer.ended
        ]

    def _tell(self, answer: _Answer, report: Report, index: int, is_first: bool) -> Update:
        """The update of one token; ends the answer if it is the last."""
        token = int(report.said.tokens_B[index])
        finish: Finish | None = None
        if token in answer.request.stop_ids:
            self._end(answer)
            return Update(answer.id, None, "stop")
        answer.said.append(token)
        if len(answer.said) == answer.request.max_new_tokens:
            finish = "length"
            self._end(answer)
        return Update(answer.id, self._new_token(answer, report, index, is_first), finish)

    def _new_token(self, answer, report: Report, index: int, is_first: bool) -> NewToken:
        said, request = report.said, answer.request
        depth = int(said.depths_B[index])
        known = min(request.alternatives, self.config.vocab_size)
        alternatives = zip(
            said.alternatives_BA[index, :known].tolist(),
            said.alternative_logprobs_BA[index, :known].tolist(),
            strict=True,
        )
        readouts: tuple[LoopReadout, ...] = ()
        if request.readouts:
            ran = answer.loops if is_first or self.kv == "full" else depth
            gates_T = np.asarray(report.gates_TB[:ran, index], np.float64)
            p_T = _exit_probabilities(gates_T, answer.loops)
            readouts = tuple(
                LoopReadout(int(token), float(probability), float(p))
                for token, probability, p in zip(
                    report.readout_TB[:ran, index], report.readout_probability_TB[:ran, index],
                    p_T, strict=True,
                )
            )  # fmt: skip
        return NewToken(
            int(said.tokens_B[index]), depth, float(said.logprobs_B[index]), tuple(alternatives),
            readouts,
        )  # fmt: skip

    def _end(self, answer: _Answer) -> None:
        """Frees what a request holds, and remembers what its slot's cache can be used for."""
        answer.ended = True
        if answer.slot < 0:
            self._waiting.remove(answer)
            return
        if self._reading is answer:
            self._reading = None
        else:
            self._slots = leave_slot(self._slots, np.int32(answer.slot), self._parked)
        self._holders[answer.slot] = None
        self._kept[answer.slot] = (self._whole(answer), answer.loops)

    def _whole(self, answer: _Answer) -> list[int]:
        """Tokens whose keys and values of all loops lie in the slot: those a prompt would leave.

        The newest token has none yet. Tokens of the answer are computed to the end with `full`
        only; where loops share a set, the prompt's own are gone too.
        """
        if self.kv not in PER_LOOP:
            return []
        read = list(answer.request.prompt[: answer.read])
        whole = answer.read == len(answer.request.prompt) and self.kv == "full"
        return read + answer.said[:-1] if whole else read


def _one(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def _powers_of_two(most: int) -> list[int]:
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def _asked(answer: _Answer) -> Asked:
    request, rule = answer.request, answer.rule
    sampling = Sampling(
        jnp.float32([request.temperature]), jnp.int32([request.top_k]),
        jnp.float32([request.top_p]),
    )  # fmt: skip
    code = NO_RULE if rule is None else RULE_CODES[rule.kind]
    value = jnp.float32([0.0 if rule is None else rule.value])
    return Asked(
        sampling, jnp.int32([code]), value, jnp.int32([answer.loops]),
        jnp.array([request.alternatives > 0]), jnp.array([request.readouts]),
    )  # fmt: skip


def _exit_probabilities(gates_T: np.ndarray, loops: int) -> np.ndarray:
    """p_t of the loops that ran, in float64; the last of all `loops` takes what remains."""
    halt_T = 1 / (1 + np.exp(-gates_T))
    if len(halt_T) == loops:
        halt_T[-1] = 1.0
    before_T = np.concatenate([[1.0], np.cumprod(1 - halt_T)[:-1]])
    return halt_T * before_T
