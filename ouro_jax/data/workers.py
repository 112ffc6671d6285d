"""A function over many pieces of work, on several processes of this machine or on this one.

For more than one machine there is Beam (`beam.py`).
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any

from ouro_jax.errors import RunError, require

TICK_SECONDS = 0.5
Advance = Callable[[int, int], None]
"""What a piece calls now and then with the bytes and tokens done since the last call."""
Work = Callable[[int, Advance], Any]


class _Stopped(Exception):
    """Ends a worker's piece because another one has failed."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_pieces(
    work: Work, pieces: Sequence[int], workers: int, advance: Advance
) -> Iterator[tuple[int, Any]]:
    """Yields (piece, `work(piece, advance)`) as they end, on `workers` processes.

    `work` is pickled once per process. `advance` is called here with what all of them report. The
    first exception stops the others within one of their reports and is raised; nothing outlives
    this process. RunError if a worker dies.
    """
    require(workers >= 1, "workers", workers, "at least 1")
    if min(workers, len(pieces)) <= 1:
        yield from ((piece, work(piece, advance)) for piece in pieces)
        return
    context = multiprocessing.get_context("spawn")
    amounts, stop = context.Array("q", 2), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(pieces)), context, _start_worker, (work, amounts, stop)
    )
    try:
        waiting, pending, reported = iter(pieces), {}, [0, 0]
        while True:
            # A few pieces for each worker at a time: waiting looks at every one of them.
            for piece in itertools.islice(waiting, 3 * workers - len(pending)):
                pending[pool.submit(_run_piece, piece)] = piece
            if not pending:
                return
            done, _ = wait(pending, TICK_SECONDS, FIRST_COMPLETED)
            now = amounts[:]
            advance(now[0] - reported[0], now[1] - reported[1])
            reported = now
            yield from ((pending.pop(future), future.result()) for future in done)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process was killed, perhaps for want of memory. Repeat the command to go on, "
            "with fewer --workers if it happens again."
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(work: Work, amounts: Any, stop: Any) -> None:
    _worker.update(work=work, amounts=amounts, stop=stop)
    # As many processes as cores: threads inside each would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed first process would leave its workers waiting for pieces for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by another process"
    wait_for_end([parent.sentinel])
    os._exit(1)


def _run_piece(piece: int) -> Any:
    return _worker["work"](piece, _advance)


def _advance(num_bytes: int, num_tokens: int) -> None:
    amounts = _worker["amounts"]
    with amounts.get_lock():
        amounts[0] += num_bytes
        amounts[1] += num_tokens
    if _worker["stop"].is_set():
        raise _Stopped
