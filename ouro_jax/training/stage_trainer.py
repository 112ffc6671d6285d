"""One stage to its end: past steps that are refused, and back to a checkpoint where it must."""

import dataclasses

import jax
from etils import epath

from ouro_jax.config import to_dict
from ouro_jax.training.checkpoints import Position, StageCheckpoints
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.recovery import Patience, Refused, Spans, Unsound, skipping, span_of
from ouro_jax.training.stage_context import (
    RunContext,
    StageContext,
    event,
    log_once,
    stage_shape,
    where,
)
from ouro_jax.training.stage_run import StageRun
from ouro_jax.training.start import find_whole, fresh_state, state_from
from ouro_jax.training.state import StateFactory, TrainState
from ouro_jax.training.timing import start_clock


class StageTrainer:
    """Trains a stage from its own checkpoint or from `source`, as `start.py` says."""

    def __init__(self, run: RunContext, stage: StageContext, source: str | epath.Path | None):
        self._run, self._stage, self._source = run, stage, source
        self._patience = Patience(run.config.guard, stage.plan.name)

    def train(self, found: Position | None) -> RunContext:
        """Trains what is left after the checkpoint `found`, or all of it.

        Returns the run as it goes on: without the rows of this stage that it has skipped.
        """
        name = self._stage.plan.name
        while True:
            if found is not None and found.rows >= self._stage.plan.total_rows:
                self._run.progress.message(f"{name}: finished at step {found.step:,}.")
                log_once(self._run.log, "stage_end", found)
                return self._run
            keep = self._run.config.checkpoint.keep
            with StageCheckpoints(self._run.root / name, keep) as checkpoints:
                state, start = self._start(checkpoints, found)
                try:
                    self._train_on(checkpoints, state, start)
                    return self._run
                except Unsound as error:
                    # Its traceback would hold the state, whose memory the next one needs.
                    unsound = error.with_traceback(None)
                del state
            found = find_in(self._run)
            if found is not None and found.stage != name:
                found = None
            self._go_back(unsound, found, start)

    def _start(
        self, checkpoints: StageCheckpoints, found: Position | None
    ) -> tuple[TrainState, Position]:
        """The state and position that the stage goes on from; the log is rewound to there."""
        plan, config = self._stage.plan, self._run.config
        factory = StateFactory(
            stage_shape(config, plan.stage), config.optimizer, plan.stage.objective,
            self._stage.mesh,
        )  # fmt: skip
        if found is not None:
            state = checkpoints.restore(factory.abstract(), found.step)
            # It may skip other rows from here on than it meant to when it was saved.
            position = dataclasses.replace(found, skip_rows=plan.stage.skip_rows)
        elif self._source is None:
            state, position = fresh_state(factory, config, plan.name)
        else:
            state, position = state_from(self._source, factory, config, plan.name)
        jax.block_until_ready(state)
        start_clock().mark("restore")
        self._run.log.rewind(position.step)
        name = "resume" if position.rows else "stage_start"
        self._run.log.write(event(name, position) | {"model": to_dict(position.model)})
        self._run.events.write(name, **where(position))
        return state, position

    def _train_on(
        self, checkpoints: StageCheckpoints, state: TrainState, position: Position
    ) -> None:
        """Trains to the end of the stage, skipping what is refused; raises Unsound."""
        while True:
            try:
                StageRun(self._run, self._stage, checkpoints, state, position).run()
                return
            except Refused as error:
                refused = error
            self._skip_refused(refused)
            state = refused.state
            position = dataclasses.replace(
                refused.position, skip_rows=self._stage.plan.stage.skip_rows
            )
            if self._patience.is_over(refused):
                reason = f"{self._run.config.guard.patience} steps in a row were not taken"
                raise Unsound(f"{reason} (guard.patience)", position, by_machine=False)

    def _skip_refused(self, refused: Refused) -> None:
        plan, start, end = self._stage.plan, refused.position.rows, refused.end_rows
        span = span_of(plan.order, start, end)
        before, after = plan.order.drawn(start), plan.order.drawn(end)
        self._run.progress.message(
            f"{plan.name}: step {refused.position.step + 1:,} was not taken ({refused.reason}); "
            f"its rows {span[0]:,} to {span[1] - 1:,} are skipped."
        )
        self._run.events.write(
            "skip", **where(refused.position), reason=refused.reason,
            loss=refused.metrics["loss"], grad_norm=refused.metrics["grad_norm"], skip_rows=[span],
            rows={source: [before[source], after[source]] for source in after},
        )  # fmt: skip
        self._skip((span,))

    def _go_back(self, unsound: Unsound, found: Position | None, start: Position) -> None:
        """Notes the way back to `found`, or to the stage's start, and what is skipped after it."""
        plan = self._stage.plan
        step, rows = (found.step, found.rows) if found else (start.step, 0)
        self._patience.go_back(step, unsound.reason, unsound.by_machine)
        spans: Spans = ()
        if not unsound.by_machine and unsound.position.rows > rows:
            spans = (span_of(plan.order, rows, unsound.position.rows),)
        self._run.progress.message(
            f"{plan.name}: {unsound.reason}; back from step {unsound.position.step:,} to {step:,}"
            + "".join(f", without rows {a:,} to {b - 1:,}" for a, b in spans) + "."
        )  # fmt: skip
        self._run.events.write(
            "rollback", **where(unsound.position), to_step=step, reason=unsound.reason,
            skip_rows=spans,
        )  # fmt: skip
        self._skip(spans)

    def _skip(self, spans: Spans) -> None:
        name = self._stage.plan.name
        config = skipping(self._run.config, name, spans)
        self._run = dataclasses.replace(self._run, config=config)
        plan = StagePlan(name, config.stages[name])
        self._stage = dataclasses.replace(self._stage, plan=plan)


def find_in(run: RunContext) -> Position | None:
    """The newest whole checkpoint of the run, see `find_whole`; says what it sets aside."""

    def broken(path: epath.Path, reason: str) -> None:
        run.progress.message(f"{reason} This checkpoint is not used; it was moved to {path}.")
        run.events.write("set_aside", path=str(path), reason=reason)

    return find_whole(run.config, run.root, broken)
