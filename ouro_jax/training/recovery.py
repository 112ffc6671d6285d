"""What a run does about steps that were not taken and states that are not sound.

The rows of a refused step are skipped, as if `stages.NAME.skip_rows` had always said so: the run
goes on from the state before it, with the same step number, rate and clock. So it ends bit for bit
as a run whose config skips these rows. Where that does not help, it goes back to its last
checkpoint and skips all rows since. What is skipped is written to `events.jsonl` first, and every
later attempt takes it from there.
"""

import dataclasses
from typing import Any

from ouro_jax.config import Config, GuardConfig
from ouro_jax.data.interleave import Interleave
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.training.checkpoints import Position
from ouro_jax.training.state import TrainState

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class Refused(Exception):
    """A step was not taken: `state` and `position` are those before it, `end_rows` after it."""

    reason: str
    state: TrainState
    position: Position
    end_rows: int
    metrics: dict[str, Any]


@dataclasses.dataclass
class Unsound(Exception):
    """The state at `position` is not what it should be, for no reason that the data gave if
    `by_machine`."""

    reason: str
    position: Position
    by_machine: bool


class Patience:
    """Counts what went wrong in a stage, and says when to go back and when to give up."""

    def __init__(self, guard: GuardConfig, stage: str):
        self._guard, self._stage = guard, stage
        self._refused_step, self._refused = -1, 0
        self._went_back_to, self._went_back = -1, 0

    def is_over(self, refused: Refused) -> bool:
        """Whether so many steps in a row were refused that the state must be at fault."""
        step = refused.position.step
        self._refused = self._refused + 1 if step == self._refused_step else 1
        self._refused_step = step
        return self._refused >= self._guard.patience

    def go_back(self, step: int, reason: str, by_machine: bool) -> None:
        """Notes a return to the checkpoint of `step`; an error if it has been there too often.

        ConfigError where the training is at fault: launchers do not repeat it. RunError where the
        machine is: another one may do.
        """
        self._refused = 0
        self._went_back = self._went_back + 1 if step == self._went_back_to else 1
        self._went_back_to = step
        if self._went_back <= self._guard.rollbacks:
            return
        text = (
            f"stage {self._stage}: {reason}. The run has gone back to step {step:,} "
            f"{self._guard.rollbacks} times (guard.rollbacks) without coming further; "
        )
        if by_machine:
            raise RunError(text + "look at the devices that are named, and run it without them.")
        raise ConfigError(
            text + f"lower stages.{self._stage}.learning_rate or optimizer.clip_norm, or go on "
            "from an older checkpoint."
        )


def span_of(order: Interleave, start: int, end: int) -> tuple[int, int]:
    """The rows `start` … `end` of those given, as numbers before skipping."""
    return order.passed(start + 1) - 1, order.passed(end)


def merged(spans: Spans) -> Spans:
    """Sorted and disjoint spans of the same rows."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return tuple(joined)


def skipping(config: Config, stage: str, spans: Spans) -> Config:
    """`config`, with these spans of a stage skipped too."""
    if not spans:
        return config
    before = config.stages[stage]
    after = dataclasses.replace(before, skip_rows=merged((*before.skip_rows, *spans)))
    return dataclasses.replace(config, stages={**config.stages, stage: after})
