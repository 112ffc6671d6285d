"""The checkpoints of a running stage: what is checked before, how long it took, what went wrong.

A checkpoint that cannot be written is an alarm and no end: training goes on, and the next one is
tried when it is due. Only at the end of a stage, from which the next one reads, it is an error.
"""

import sys
import time

from ouro_jax.parallel.hosts import barrier
from ouro_jax.training.checkpoints import Position, SaveError, StageCheckpoints
from ouro_jax.training.recovery import Unsound
from ouro_jax.training.stage_context import RunContext, StageContext, where
from ouro_jax.training.state import TrainState
from ouro_jax.training.state_checks import disagreeing, not_finite, state_sums

# The newest checkpoint may be so many times older than it is meant to be before an alarm.
OLD = 3


class Saves:
    """Saves a stage's states, and tells the run's events of it."""

    def __init__(self, run: RunContext, stage: StageContext, checkpoints: StageCheckpoints):
        self._run, self._stage, self._checkpoints = run, stage, checkpoints
        self._saving: tuple[Position, bool, float] | None = None
        self._alarm_after = OLD * 60 * run.config.checkpoint.every_minutes
        self._alarmed_at = time.monotonic()

    def save(self, state: TrainState, position: Position, permanent: bool, wait: bool) -> None:
        """Starts a checkpoint, or makes one and returns when it is whole if `wait`.

        Raises Unsound if the state is not finite or its replicas differ. With `wait`, SaveError.
        """
        began = time.perf_counter()
        self._check(state, position)
        self._settle()
        try:
            self._checkpoints.save(state, position, self._run.described, permanent=permanent)
        except SaveError as error:
            self._failed(error, wait)
            return
        self._saving = position, permanent, time.perf_counter() - began
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is whole; raises SaveError if it failed."""
        self._checkpoints.wait()
        self._run.watchdog.has_unsaved = False
        self._over()

    def poll(self) -> None:
        """Notes a checkpoint that has become whole, or could not; alarms if none has for long."""
        try:
            if self._checkpoints.poll():
                self._over()
        except SaveError as error:
            self._failed(error, final=False)
        passed = time.monotonic() - self._alarmed_at
        if self._alarm_after and passed > self._alarm_after:
            self._alarm(
                f"the newest checkpoint is {passed / 60:.0f} minutes old; one is meant to be "
                f"written every {self._run.config.checkpoint.every_minutes:g}."
            )
            self._alarmed_at = time.monotonic()

    def finish(self) -> None:
        """Returns when no save is going on."""
        self._settle()
        barrier("no save is going on")  # also where one process's save has failed

    def _settle(self) -> None:
        """Waits for a save of this process and notes what came of it."""
        try:
            self._checkpoints.settle()
            self._over()
        except SaveError as error:
            self._failed(error, final=False)

    def _check(self, state: TrainState, position: Position) -> None:
        sums = state_sums(state, self._stage.mesh)
        if differing := disagreeing(state, sums, self._stage.mesh):
            raise Unsound(f"replicas differ: {differing[0]}", position, by_machine=True)
        if wrong := not_finite(state, sums):
            raise Unsound(f"{wrong[0]} is not finite", position, by_machine=False)

    def _over(self) -> None:
        if self._saving is None:
            return
        (position, permanent, stall), self._saving = self._saving, None
        self._alarmed_at = time.monotonic()
        self._run.progress.saved()
        self._run.events.write(
            "checkpoint", **where(position), permanent=permanent, stall_seconds=stall
        )

    def _failed(self, error: SaveError, final: bool) -> None:
        self._saving = None
        if final:
            raise error
        self._alarm(f"{error} Training goes on; the checkpoints before it are as they were.")

    def _alarm(self, text: str) -> None:
        print(f"ALARM: {text}", file=sys.stderr, flush=True)
        self._run.events.write("alarm", text=text)
