"""A thread beside the training loop: it sees when the loop is stuck, and when it is asked to stop.

The loop says what it does now (`enter`). A phase that takes longer than its deadline ends the
process with code 124, after the stacks of all threads, which name the place. SIGTERM asks the run
to stop: the loop saves at its next step. Where nothing has been trained since the last checkpoint
(while the run starts, or compiles) the thread ends the process itself, for the loop may be inside
the compiler for minutes. A second SIGTERM ends it in any case; what is saved is saved whole.
"""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ouro_jax.errors import STUCK_CODE, Stopped
from ouro_jax.parallel.hosts import stop_all
from ouro_jax.settings import DeadlineConfig

POLL_SECONDS = 0.5
# Launchers and process groups may deliver one signal twice.
SAME_SIGNAL_SECONDS = 2.0
# This thread cannot run while another holds Python's lock; then C code does the same, with code 1.
LOCKED_SECONDS = 300.0


class Watchdog:
    """Use as a context manager, in the main thread; what is there before is put back after.

    `stacks` is the file of the stacks; `ended(reason, code)` is told before the process ends here.
    """

    def __init__(self, deadlines: DeadlineConfig, stacks: Path,
                 ended: Callable[[str, int], None] = lambda reason, code: None):  # fmt: skip
        self._deadlines, self._stacks, self._ended = deadlines, stacks, ended
        self._phase, self._since = "start", time.monotonic()
        self._asked_at: float | None = None
        self.has_unsaved = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether SIGTERM has come."""
        return self._asked_at is not None

    def answered(self) -> None:
        """What was asked for is done: the loop ends by itself."""
        self._asked_at = None

    def enter(self, phase: str) -> None:
        """The loop does this from now on: a field of DeadlineConfig."""
        self._phase, self._since = phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._wake, self._signals = os.pipe()
        os.set_blocking(self._signals, False)
        # Python's own handlers wait for the main thread; the descriptor is written at once.
        self._fd_before = signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGTERM, self._handler_before)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._wake)
        os.close(self._signals)

    def _watch(self) -> None:
        while not self._done.is_set():
            faulthandler.dump_traceback_later(LOCKED_SECONDS, exit=True, file=2)
            if select.select([self._wake], [], [], POLL_SECONDS)[0]:
                numbers = os.read(self._wake, 64)
                if signal.SIGTERM in numbers:
                    self._asked()
            if self._asked_at and self._phase in ("start", "compile") and not self.has_unsaved:
                self._leave("asked to stop; nothing was trained since the last checkpoint",
                            Stopped.exit_code)  # fmt: skip
            limit, passed = getattr(self._deadlines, self._phase), time.monotonic() - self._since
            if limit and passed > limit:
                self._expired(passed, limit)

    def _asked(self) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            print("asked to stop: the run saves at its next step.", file=sys.stderr, flush=True)
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            self._leave("asked to stop a second time; what was trained since the last checkpoint "
                        "is lost", 128 + signal.SIGTERM)  # fmt: skip

    def _expired(self, passed: float, limit: float) -> NoReturn:
        phase = self._phase
        reason = (
            f"phase {phase!r} has taken {passed:.0f} s, more than deadlines.{phase} = {limit:g}; "
            f"the stacks of all threads are above and in {self._stacks}"
        )
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("a") as file:
            print(f"\n{time.strftime('%F %T')}: {reason}", file=file, flush=True)
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(sys.stderr)
        self._leave(reason, STUCK_CODE)

    def _leave(self, reason: str, code: int) -> NoReturn:
        self._ended(reason, code)
        stop_all(code, f"error: watchdog: {reason}. Run the same command again to go on.")
