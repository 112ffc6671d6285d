"""The loop over one stage's optimizer steps, with its log, evaluations and checkpoints.

Metrics are read one step late: the device computes a step while the host waits for the one before.
With them every process learns at the same step what one of them asks of all: to save (process 0's
clock), or to save and stop (SIGTERM on any of them).
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from ouro_jax.errors import Stopped
from ouro_jax.parallel.devices import memory_use, peak_flops
from ouro_jax.parallel.host_rows import data_host, place
from ouro_jax.parallel.mesh import batch_sharding, batch_shards
from ouro_jax.training.checkpoints import Position, StageCheckpoints
from ouro_jax.training.evaluation import evaluate
from ouro_jax.training.recovery import Refused, Unsound
from ouro_jax.training.repeat import is_repeated, step_twice
from ouro_jax.training.requests import STOP, Requests
from ouro_jax.training.saves import Saves
from ouro_jax.training.stage_context import (
    RunContext,
    StageContext,
    event,
    log_once,
    step_spec,
    where,
)
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.state import TrainState
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step


class StageRun:
    """The loop over one stage's steps. Raises Refused and Unsound, with the state before them."""

    def __init__(self, run: RunContext, stage: StageContext, checkpoints: StageCheckpoints,
                 state: TrainState, position: Position):  # fmt: skip
        self.run_, self.context, self.plan = run, stage, stage.plan
        self.state, self.position = state, position
        self.mixture = open_stage_mixture(run.config, run.data_root, self.plan, run.bad_rows)
        self.config, self.stage = run.config, self.plan.stage
        self.spec = step_spec(run.config, stage)
        self.programs = {
            loops: compiled_train_step(_with_loops(self.spec, loops)) for loops in self.plan.depths
        }
        self.sharding = batch_sharding(stage.mesh, microbatched=True)
        self.unread: tuple[Position, Any, float] | None = None
        self.times, self.peak = run.times, peak_flops(run.config.model.dtype)
        self.requests = Requests(run.watchdog, stage.mesh, run.config.checkpoint.every_minutes)
        self.saves = Saves(run, stage, checkpoints)
        self.times.steps.pause()

    def run(self) -> None:
        """Trains to the end of the stage, with evaluation, log and checkpoints on the way."""
        run, plan, length = self.run_, self.plan, self.stage.sequence_length
        self.times.start(plan.name, self.position.step)
        run.progress.start_stage(
            plan.name, plan.total_rows * length,
            done_tokens=self.position.rows * length, tokens_after=self.context.tokens_after,
        )  # fmt: skip
        host = data_host(self.context.mesh)
        batches = self.mixture.batches(
            self.position.rows, plan.batch_rows, host=host.index, num_hosts=host.count
        )
        with contextlib.closing(batches), self.times.split("step"):
            try:
                for start, batch in self._awaited(batches):
                    self._profile()
                    self._optimizer_step(start, batch)
                    self._after_step()
            except (Refused, Unsound):
                self.saves.finish()
                raise
            run.profiler.close()
        log_once(run.log, "stage_end", self.position)
        run.events.write("stage_end", **where(self.position))
        run.progress.finish_stage()
        self.times.end_stage(plan.name, self.position.step)

    def _after_step(self) -> None:
        """Evaluates, saves and stops where it is time to."""
        self.saves.poll()
        finished = self.position.rows >= self.plan.total_rows
        if self._passed(self.config.evaluation.every_tokens) or finished:
            self._evaluate()
        permanent = self._passed(self.config.checkpoint.every_tokens) or finished
        if permanent or self.requests.agreed:
            # What is saved was finite: the loss and gradient of every step before have been read.
            self._drain()
            stops = self.requests.agreed == STOP
            with self.times.split("checkpoint"):
                self.saves.save(self.state, self.position, permanent, wait=finished or stops)
            self.requests.saved()
            if stops:
                self.run_.watchdog.answered()
                raise Stopped(
                    f"stopped as asked, and saved at step {self.position.step:,}. Run the same "
                    "command again to go on."
                )

    def _awaited(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches. Waiting for one costs nothing while the devices are still at work."""
        while True:
            with self.times.split("data"):
                item = next(batches, None)
                if self.unread and not self.unread[1]["loss"].is_ready():
                    self.times.split.count_as("step")
            if item is None:
                return
            yield item

    def _profile(self) -> None:
        """Begins or ends a trace where one is due, between two steps."""
        run, step = self.run_, self.position.step + 1
        if run.profiler.is_due(step):
            self._drain()
            with self.times.split("other"):
                run.profiler.turn(self.plan.name, step)

    def _optimizer_step(self, start: int, batch: Any) -> None:
        rows = self.plan.batch_rows(start)
        shards = batch_shards(self.context.mesh)
        microbatches = rows // (self.context.layout.microbatch_rows * shards)
        batch = jax.tree.map(lambda x_BL: x_BL.reshape(microbatches, -1, x_BL.shape[-1]), batch)
        end, before = start + rows, self.position
        rate, deviations = self.plan.learning_rate(end), self.config.guard.spike_deviations
        inputs = jax.device_put(StepInputs(*map(np.float32, (
            rate, self.stage.weight_decay, self.stage.entropy_weight, self.stage.rope_theta,
            deviations or math.inf,
        )), step=np.int32(before.step)))  # fmt: skip
        inputs = inputs._replace(requests=self.requests.ask(before.step))
        batch, step = place(batch, self.sharding), before.step + 1
        loops = self.plan.num_loops(start)
        program = self.programs[loops]
        with (
            self.times.program(self.plan.name, step, (microbatches, loops)),
            jax.profiler.StepTraceAnnotation("train", step_num=step),
        ):
            if is_repeated(self.config.guard, step):
                self.state, metrics = step_twice(
                    program, self.context.mesh, self.state, batch, inputs, before
                )
            else:
                self.state, metrics = program(self.state, batch, inputs)
        self.run_.watchdog.has_unsaved = True
        self.position = dataclasses.replace(
            before,
            step=step,
            rows=end,
            tokens_seen=before.tokens_seen + rows * self.stage.sequence_length,
        )
        self._log_restarts(start)
        self._read_metrics()
        self.unread = (self.position, metrics, rate)

    def _log_restarts(self, start: int) -> None:
        """Says so where a source has run out and begins again in the step from row `start` on."""
        run, position = self.run_, self.position
        for source, epoch in self.mixture.restarts(start, position.rows).items():
            run.log.write(event("source_restart", position) | {"source": source, "epoch": epoch})
            run.progress.message(
                f"{position.stage}: source {source!r} starts again at token "
                f"{position.tokens_seen:,}, epoch {epoch}."
            )

    def _read_metrics(self) -> None:
        if self.unread is None:
            return
        (position, metrics, rate), self.unread = self.unread, None
        means = jax.tree.map(np.ndarray.tolist, jax.device_get(metrics))
        self.run_.times.first_step(self.run_.events, where(position))
        self.requests.heard(means.pop("request"))
        if not means.pop("accepted"):
            self._refuse(position, means)
        self.times.steps.step_ended(self._batch_tokens(position))
        record = self._record(position, rate, means)
        self.run_.progress.update(record)
        is_last = position.rows >= self.plan.total_rows
        if position.step % self.config.logging.every_steps == 0 or is_last:
            self.run_.log.write(record | self.times.window(position.stage, position.step))

    def _refuse(self, position: Position, means: dict[str, Any]) -> NoReturn:
        """The step that would have ended at `position` was not taken, nor was any after it."""
        limit = self.config.guard.spike_deviations
        loss, norm = means["loss_deviations"], means["grad_norm_deviations"]
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            reason = f"loss {means['loss']}, gradient norm {means['grad_norm']}"
        elif limit and max(loss, norm) > limit:
            reason = (
                f"a spike: loss {means['loss']:.4g}, {loss:.1f} deviations above the median, "
                f"gradient norm {means['grad_norm']:.4g}, {norm:.1f}"
            )
        else:
            raise RuntimeError(f"step {position.step} does not follow the state: a bug of ours")
        rows = self.plan.batch_rows(position.rows - 1)
        before = dataclasses.replace(
            position, step=position.step - 1, rows=position.rows - rows,
            tokens_seen=position.tokens_seen - self._batch_tokens(position),
        )  # fmt: skip
        raise Refused(reason, self.state, before, position.rows, means)

    def _drain(self) -> None:
        """Reads the last step, after which the devices stand still: not how long a step takes."""
        self.times.steps.pause()
        self._read_metrics()
        self.times.steps.pause()

    def _record(self, position: Position, rate: float, means: dict[str, Any]) -> dict[str, Any]:
        """The `train` record of the step that ended at `position`."""
        length = self.stage.sequence_length
        speed = self.times.steps.tokens_per_second
        flops = self.plan.flops_per_token(position.model)
        given = self.mixture.order.given(position.rows)
        return {
            "kind": "train", "time": time.time(), "stage": position.stage, "step": position.step,
            "tokens": position.tokens_seen, "learning_rate": rate,
            "batch_tokens": self._batch_tokens(position),
            "source_tokens": {source: rows * length for source, rows in given.items()},
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed and speed / self.context.mesh.size,
            "mfu": speed and self.peak.mfu(speed * flops), "mfu_peak": self.peak.source,
            **memory_use(), **means,
        }  # fmt: skip

    def _batch_tokens(self, position: Position) -> int:
        """Tokens of the step that ended at `position`."""
        return self.plan.batch_rows(position.rows - 1) * self.stage.sequence_length

    def _passed(self, every_tokens: int) -> bool:
        after = self.position.rows * self.stage.sequence_length
        before = after - self._batch_tokens(self.position)
        return after // every_tokens > before // every_tokens

    def _evaluate(self) -> None:
        self._drain()
        run = self.run_
        with self.times.split("evaluation"):
            for record in evaluate(
                self.config, run.data_root, self.plan, self.spec, self.state.params
            ):
                run.log.write(record | where(self.position) | {"time": time.time()})


def _with_loops(spec: StepSpec, loops: int) -> StepSpec:
    """The same step with another number of loops."""
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_loops=loops))
