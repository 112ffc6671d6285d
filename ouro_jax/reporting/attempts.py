"""The attempts at a run and what happened in them, from `times.jsonl` and `events.jsonl`."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

HAPPENINGS: tuple[str, ...] = (
    "kill", "failure", "stop", "rollback", "skip", "set_aside", "config_change", "alarm", "bad_row",
)  # fmt: skip
# Exit codes of a process that was not at fault: it came to the end, or was asked to stop.
GOOD_CODES = (0, 75)
# Records that say how far the run was; a checkpoint is reported when later steps were trained.
SIGNS_OF_PROGRESS = frozenset({"window", "first_step", "stop", "rollback"})


@dataclass
class Attempt:
    """One process that trained, from its beginning to its last sign of life.

    `climbs` holds (time, step) pairs; every rollback begins a new list. `ending` is the record
    that closes it, None where there is none: it was killed, or goes on.
    """

    began: float
    ended: float
    climbs: list[list[tuple[float, int]]]
    ending: Record | None = None


@dataclass
class Timeline:
    """All attempts at a run, in order, and its events.

    `happenings` are the events that a person should know of, oldest first: those whose kind is in
    HAPPENINGS, where a stop by a fault has become a `failure`, and a `kill` was added at the last
    sign of life of every attempt that another follows though it said no farewell.
    """

    attempts: list[Attempt] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    happenings: list[Record] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """How often each kind happened."""
        return Counter(event["kind"] for event in self.happenings)


def make_timeline(events: Sequence[Record], times: Sequence[Record]) -> Timeline:
    """Sorts events and times into attempts. Those before the first event ended nobody knows how."""
    events = sorted(events, key=_time)
    starts = [event for event in events if event["kind"] == "start"]
    first = min(map(_began, starts), default=math.inf)
    untold = [line for line in times if line["kind"] == "attempt" and line["time"] < first]
    attempts = _attempts([*untold, *starts], events, times)
    happenings = []
    for event in events:
        failed = event["kind"] == "stop" and event["code"] not in GOOD_CODES
        happenings.append(event | {"kind": "failure"} if failed else event)
    for attempt in attempts[len(untold) : -1]:
        if attempt.ending is None:
            step = attempt.climbs[-1][-1][1]
            happenings.append({"kind": "kill", "time": attempt.ended, "step": step})
    happenings = [event for event in happenings if event["kind"] in HAPPENINGS]
    return Timeline(attempts, events, sorted(happenings, key=_time))


def _attempts(
    starts: Sequence[Record], events: Sequence[Record], times: Sequence[Record]
) -> list[Attempt]:
    attempts = [
        Attempt(_began(start), start["time"], [[(_began(start), start["step"])]])
        for start in starts
    ]
    begins = [attempt.began for attempt in attempts]
    timed = [record for record in (*times, *events) if "time" in record and attempts]
    for record in sorted(timed, key=_time):
        now, kind = record["time"], record["kind"]
        attempt = attempts[max(bisect_right(begins, now) - 1, 0)]
        attempt.ended = max(attempt.ended, now)
        if kind in SIGNS_OF_PROGRESS and "step" in record:
            attempt.climbs[-1].append((now, record["step"]))
        if kind == "rollback":
            attempt.climbs.append([(now, record["to_step"])])
        if kind in ("stop", "finished"):
            attempt.ending = record
    return attempts


def _time(record: Record) -> float:
    return record["time"]


def _began(start: Record) -> float:
    # What a process did before it trained, such as setting a checkpoint aside, is its own.
    return start["time"] - sum(start.get("seconds", {}).values())
