"""`events.jsonl`: what happened to a run, over all attempts at it.

Unlike the log of the training, `metrics.jsonl`, it is never rewound. Its lines have `kind` and
`time` (since 1970), most also `stage`, `step` and `tokens`, and of
  start, first_step    `seconds` by cause since the process began; `devices`, `processes`, versions
  stop                 `reason` and `code`; a process that was killed leaves none
  checkpoint           `permanent`, `stall_seconds`: how long training waited for it
  skip                 `reason`, `loss`, `grad_norm`, `skip_rows`, `rows` of each source
  rollback             `to_step`, `reason`, `skip_rows`
  set_aside            `path` and `reason`: a broken checkpoint
  config_change        `changes`: key → [old, new]
  bad_row              `source`, `shard`, `record`, `reason`: unreadable, replaced by padding
  alarm                `text`
  stage_start, stage_end, finished
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ouro_jax.training.lines import Lines, read_lines

FILE_NAME = "events.jsonl"


class EventLog:
    """Writes a run's events, from any thread; with `enabled` False (processes 1, …) does nothing.

    The file is made by the first event, so that a run which is refused leaves none.
    """

    def __init__(self, workdir: str | Path, *, enabled: bool = True):
        self._path, self._enabled = Path(workdir) / FILE_NAME, enabled
        self._lines: Lines | None = None
        self._lock, self._has_started = threading.Lock(), False

    def write(self, kind: str, **fields: Any) -> None:
        """Appends an event of now."""
        if not self._enabled:
            return
        self._has_started |= kind == "start"
        record = {"kind": kind, "time": time.time()} | fields
        with self._lock:
            if self._lines is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._lines = Lines(self._path)
            self._lines.append(record)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Around all that an attempt does: notes how it ends, unless it is killed."""
        try:
            yield
        except BaseException as error:
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            self.ended(f"{type(error).__name__}: {error}", code)
            raise
        self.ended("finished", 0)

    def ended(self, reason: str, code: int) -> None:
        """Notes the end of an attempt that has begun to train."""
        if self._has_started:
            self.write("stop", reason=reason, code=code)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._lines is not None:
                self._lines.close()
                self._lines = None


def read_events(workdir: str | Path) -> list[dict[str, Any]]:
    """The events of a run in order; none if there is no file yet."""
    path = Path(workdir) / FILE_NAME
    return read_lines(path) if path.exists() else []


def skipped_rows(workdir: str | Path, stage: str) -> tuple[tuple[int, int], ...]:
    """The spans of a stage's rows that its run has skipped by itself, in the order of events.

    An attempt that begins before them skips them from the start: so it repeats what the one
    before it made of the same rows, also where the fault was the machine's and is gone.
    """
    return tuple(
        (start, stop)
        for event in read_events(workdir)
        if event["kind"] in ("skip", "rollback") and event["stage"] == stage
        for start, stop in event["skip_rows"]
    )
