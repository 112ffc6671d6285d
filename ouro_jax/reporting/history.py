"""The records of a run, sorted into stages and held-out measurements."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ouro_jax.reporting.attempts import Record, Timeline, make_timeline
from ouro_jax.training.timing import time_spent


@dataclass
class StageHistory:
    """One stage: the tokens it spans, its model and what was recorded.

    `heldout` holds the last measurement of every source, `seconds` the wall time by what it went
    to, over all attempts.
    """

    name: str
    start: int
    end: int
    model: Record = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    heldout: dict[str, Record] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class RunHistory:
    """A whole run: its stages in order, baselines by source, events of the log and attempts.

    `times` are the lines of `times.jsonl`.
    """

    stages: list[StageHistory] = field(default_factory=list)
    baselines: dict[str, Record] = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)
    times: Sequence[Record] = ()
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def tokens(self) -> int:
        """Tokens seen, those of the runs that this one started from included."""
        return self.stages[-1].end if self.stages else 0

    @property
    def finished(self) -> bool:
        """Whether the last thing that happened was the end of the run."""
        return bool(self.events) and self.events[-1]["event"] == "finished"

    @property
    def timed(self) -> list[StageHistory]:
        """The stages whose time was written down."""
        return [stage for stage in self.stages if stage.seconds]

    @property
    def measured(self) -> list[StageHistory]:
        """The stages in which the held-out text was measured."""
        return [stage for stage in self.stages if stage.heldout]


def sort_records(
    records: list[Record], times: Sequence[Record] = (), events: Sequence[Record] = ()
) -> RunHistory:
    """Sorts the records of `read_log`, kinds that it does not know left out, and of `read_times`
    and `read_events`.
    """
    run = RunHistory(times=times, timeline=make_timeline(events, times))
    for record in records:
        kind = record["kind"]
        if kind == "baseline":
            run.baselines[record["source"]] = record
        elif kind in ("event", "train", "heldout"):
            stage = _stage_of(run, record)
            stage.end = max(stage.end, record["tokens"])
            if kind == "event":
                run.events.append(record)
                stage.model = record.get("model", stage.model)
            elif kind == "train":
                stage.train.append(record)
            else:
                stage.heldout[record["source"]] = record
    spent = time_spent(times)
    for stage in run.stages:
        stage.seconds = spent.get(stage.name, {})
    return run


def _stage_of(run: RunHistory, record: Record) -> StageHistory:
    for stage in run.stages:
        if stage.name == record["stage"]:
            return stage
    tokens = record["tokens"]
    # A log that lacks the stage's start: its first record says how many tokens came before.
    start = run.tokens if run.stages else tokens - record.get("batch_tokens", 0)
    run.stages.append(StageHistory(record["stage"], start, tokens))
    return run.stages[-1]


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which one says a duration, in seconds, and its name."""
    units = ((86_400, "days"), (3_600, "h"), (60, "min"))
    return next((unit for unit in units if seconds >= 2 * unit[0]), (1, "s"))


def short_time(seconds: float) -> str:
    """A duration as one says it: 41 s, 12 min, 3.4 h, 5.2 days."""
    size, unit = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def short_count(number: float) -> str:
    """A count as one says it: 950, 1.2K, 20B, 7.7T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
