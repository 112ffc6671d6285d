"""Where the time of a run goes: parts of wall time, durations of steps, goodput over restarts.

Everything is measured on the host and nothing waits for a device: a step is dispatched and its
metrics are read one step late, so the time from one read to the next is that of a step.

ml-goodput-measurement is not used: it cannot be installed without Google Cloud Logging, and needs
that service to run.
"""

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ouro_jax.training.events import EventLog
from ouro_jax.training.lines import Lines, read_lines

FILE_NAME = "times.jsonl"
# Parts of a window: `data` is waiting for rows while the devices have nothing to do, `checkpoint`
# what of saving the loop waits for, `other` the start of a process and of a stage.
PARTS: tuple[str, ...] = ("step", "data", "compile", "evaluation", "checkpoint", "other")
# What accounting over the attempts adds: steps that were trained again after a restart, and the
# time from the last sign of life of an attempt to the start of the next.
LOST_PARTS: tuple[str, ...] = ("repeated", "stopped")


@dataclass
class Compilations:
    """Seconds that JAX traced, lowered and compiled in the main thread, and cache hits."""

    seconds: float = 0.0
    cache_hits: int = 0
    _spans: list[tuple[float, float]] = field(default_factory=list)

    def add_span(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        """Listens to `jax.monitoring`; other threads (checkpoints) cost the loop nothing."""
        if not event.startswith("/jax/core/compile/"):
            return
        if threading.current_thread() is not threading.main_thread():
            return
        # Functions traced inside this one were reported first.
        while self._spans and self._spans[-1][0] >= start_time:
            start, end = self._spans.pop()
            self.seconds -= end - start
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time

    def add_event(self, event: str, **_: Any) -> None:
        """Listens to `jax.monitoring`."""
        self.cache_hits += event == "/jax/compilation_cache/cache_hits"


@functools.cache
def compilations() -> Compilations:
    """The count of this process, from the first call on."""
    count = Compilations()
    jax.monitoring.register_event_time_span_listener(count.add_span)
    jax.monitoring.register_event_listener(count.add_event)
    return count


class StartClock:
    """Where the time goes between the start of the process and its first step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.time() - _process_age()

    def mark(self, cause: str) -> None:
        """The time since the last mark went to `cause`."""
        now = time.time()
        self.seconds[cause] = self.seconds.get(cause, 0.0) + now - self._last
        self._last = now


@functools.cache
def start_clock() -> StartClock:
    """That of this process."""
    return StartClock()


def _process_age() -> float:
    """Seconds since this process began; 0 on systems that do not say (Linux does)."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    began_ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - began_ticks / os.sysconf("SC_CLK_TCK")


class TimeSplit:
    """Gives every moment to one part: `with split("data"):` until it ends or an inner one begins.

    Outside of any it is `other`. Seconds of `compiled` go to `compile`, wherever they were spent.
    `entered` hears of every part as it begins.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        compiled: Callable[[], float] = lambda: 0.0,
        entered: Callable[[str], None] = lambda part: None,
    ):
        self._clock, self._compiled, self._entered = clock, compiled, entered
        self._now, self._compiled_now = clock(), compiled()
        self._part, self._seconds = "other", dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The time inside counts as `part`."""
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def count_as(self, part: str) -> None:
        """The part that is running turns out to have been `part`."""
        self._part = part

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; they sum to the time that passed."""
        self._switch(self._part)
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def _switch(self, part: str) -> str:
        now, compiled = self._clock(), self._compiled()
        passed = now - self._now
        compiling = min(compiled - self._compiled_now, passed)
        self._seconds["compile"] += compiling
        self._seconds[self._part] += passed - compiling
        self._now, self._compiled_now = now, compiled
        before, self._part = self._part, part
        self._entered(part)
        return before


class StepClock:
    """Durations of the steps of a window, from end to end of steps that followed one another."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._last_end: float | None = None
        self._seconds: list[float] = []
        self._tokens = 0

    def pause(self) -> None:
        """The devices do something else before the next step: its duration is not known."""
        self._last_end = None

    def step_ended(self, tokens: int) -> None:
        """A step of so many tokens ended just now."""
        before, self._last_end = self._last_end, self._clock()
        if before is not None:
            self._seconds.append(self._last_end - before)
            self._tokens += tokens

    @property
    def tokens_per_second(self) -> float | None:
        """The mean of the window, over the steps whose duration is known."""
        return self._tokens / sum(self._seconds) if self._seconds else None

    def take(self) -> dict[str, float | None]:
        """Percentiles of the window in seconds, None if no duration is known; begins the next."""
        names, ranks = ("p50", "p90", "p99", "max"), (50, 90, 99, 100)
        seconds, self._seconds, self._tokens = self._seconds, [], 0
        values = np.percentile(seconds, ranks).tolist() if seconds else [None] * len(names)
        return dict(zip(names, values, strict=True))


class RunTimes:
    """The clocks of a run, and `times.jsonl`: what every attempt at it did with its time.

    Unlike the log this file is never rewound, so that work lost to a kill stays counted. Its lines
    (seconds, `time` since 1970): `attempt` at the start of a process that trains, `window` with
    its seconds by part at every record of the log, `compile` for every compiled step, `end` when
    the run came to its end. `tell` gets what a person should read, `entered` every phase of the run
    (a field of DeadlineConfig). With `enabled` False (processes 1, …) nothing is written.
    """

    def __init__(
        self, workdir: str | Path, tell: Callable[[str], None] = print, *, enabled: bool = True,
        entered: Callable[[str], None] = lambda phase: None,
    ):  # fmt: skip
        self._workdir, self._tell, self._enabled = Path(workdir), tell, enabled
        self._file: Lines | None = None
        self._began, self._step = time.time(), 0
        self._entered, self._programs, self._has_stepped = entered, set[Any](), False
        self.split = TimeSplit(
            compiled=lambda: compilations().seconds,
            entered=lambda part: entered("start" if part == "other" else part),
        )
        self.steps = StepClock()

    def __enter__(self) -> "RunTimes":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        if self._file is not None:
            if failure is None:
                self._write("end", time=time.time())
            self._file.close()

    def start(self, stage: str, step: int) -> None:
        """Training goes on from `step`: an attempt begins with the process's first stage, and
        another one where the run goes back to a checkpoint."""
        if not self._enabled or (self._file is not None and step >= self._step):
            return
        began = self._began if self._file is None else time.time()
        self._file = self._file or Lines(self._workdir / FILE_NAME)
        self._write("attempt", time=began, stage=stage, step=step)
        self._step = step

    def first_step(self, events: EventLog, where: dict[str, Any]) -> None:
        """The metrics of a step are here; notes what the first one of the process waited for."""
        if not self._has_stepped:
            self._has_stepped = True
            start_clock().mark("first step")
            events.write("first_step", **where, seconds=start_clock().seconds)

    @contextlib.contextmanager
    def program(self, stage: str, step: int, shape: Any = None) -> Iterator[None]:
        """Around the call of a compiled step: says so if the call compiled it.

        The first call for a stage and a `shape` of batch is the phase `compile`.
        """
        if (stage, shape) not in self._programs:
            self._programs.add((stage, shape))
            self._entered("compile")
        count = compilations()
        before, hits = count.seconds, count.cache_hits
        yield
        if not self._has_stepped:
            start_clock().mark("compile")
        seconds, cached = count.seconds - before, count.cache_hits > hits
        if seconds > 0:
            self.steps.pause()
            self._write("compile", stage=stage, step=step, seconds=seconds, from_cache=cached)
            how = "compiled in" if not cached else "compiled before, read from the cache in"
            self._tell(f"{stage}: step {step:,} {how} {seconds:.1f} s.")

    def window(self, stage: str, step: int) -> dict[str, Any]:
        """Ends a window at `step`: writes it down, and returns its fields of the log's record."""
        seconds = self.split.take()
        self._write(
            "window", time=time.time(), stage=stage, step=step, steps=step - self._step,
            seconds=seconds,
        )  # fmt: skip
        self._step = step
        return {"seconds": seconds, "step_seconds": self.steps.take()}

    def end_stage(self, stage: str, step: int) -> None:
        """Ends the last window of a stage, and tells where the stage's time went."""
        self.window(stage, step)
        if self._file is None:
            return
        parts = time_spent(read_times(self._workdir))[stage]
        wall = sum(parts.values())
        shares = sorted(((100 * seconds / wall, part) for part, seconds in parts.items()))
        text = ", ".join(f"{part} {share:.1f} %" for share, part in shares[::-1] if share >= 0.05)
        self._tell(f"{stage}: {wall:,.0f} s of wall time: {text}.")

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is not None:
            self._file.append({"kind": kind} | fields)


def read_times(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `times.jsonl`; none if it has not trained yet."""
    path = Path(workdir) / FILE_NAME
    return read_lines(path) if path.exists() else []


def time_spent(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Wall seconds of every stage by PARTS and LOST_PARTS, over all attempts of a run.

    A step counts once: what was trained after the checkpoint that a later attempt began from is
    `repeated`. Time between attempts is `stopped`, unless the run had come to its end.
    """
    records = list(records)
    kept, kept_until = [], math.inf
    for record in reversed(records):
        if record["kind"] == "attempt":
            kept_until = min(kept_until, record["step"])
        elif record["kind"] == "window":
            steps = max(record["steps"], 1)
            kept.append(min(max(kept_until - record["step"] + steps, 0), steps) / steps)
    spent: dict[str, dict[str, float]] = {}
    alive = math.inf
    for record in records:
        if record["kind"] == "end":
            alive = math.inf
        if record["kind"] not in ("attempt", "window"):
            continue
        stage = spent.setdefault(record["stage"], dict.fromkeys((*PARTS, *LOST_PARTS), 0.0))
        if record["kind"] == "attempt":
            stage["stopped"] += max(record["time"] - alive, 0.0)
        else:
            share = kept.pop()
            for part, seconds in record["seconds"].items():
                stage[part] += seconds
            stage["step"] -= (1 - share) * record["seconds"]["step"]
            stage["repeated"] += (1 - share) * record["seconds"]["step"]
        alive = record["time"]
    return spent


def goodput(spent: dict[str, dict[str, float]]) -> float | None:
    """The share of wall time in steps that count, in %; None before the first window."""
    wall = sum(sum(parts.values()) for parts in spent.values())
    return 100 * sum(parts["step"] for parts in spent.values()) / wall if wall else None
