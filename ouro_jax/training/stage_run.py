"""The loop over one stage's optimizer steps, with its log, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ouro_jax.config import Config, ModelConfig, Stage, to_dict
from ouro_jax.parallel.devices import memory_use, peak_flops
from ouro_jax.parallel.host_rows import data_host, place
from ouro_jax.parallel.mesh import batch_sharding, batch_shards
from ouro_jax.training.checkpoints import Position, StageCheckpoints
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.evaluation import evaluate
from ouro_jax.training.layout import Layout
from ouro_jax.training.profiling import Profiler
from ouro_jax.training.progress import Progress
from ouro_jax.training.run_log import RunLog
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.state import TrainState
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step
from ouro_jax.training.timing import RunTimes


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the stages of a run share."""

    config: Config
    workdir: Path
    data_root: epath.Path
    log: RunLog
    progress: Progress
    times: RunTimes
    profiler: Profiler


@dataclasses.dataclass(frozen=True)
class StageContext:
    """A stage, how it is laid out, and how many tokens of later stages follow it."""

    plan: StagePlan
    layout: Layout
    mesh: Mesh
    tokens_after: int


class StageRun:
    """The loop over one stage's steps."""

    def __init__(self, run: RunContext, stage: StageContext, checkpoints: StageCheckpoints,
                 state: TrainState, position: Position):  # fmt: skip
        self.run_, self.context, self.plan = run, stage, stage.plan
        self.checkpoints, self.state, self.position = checkpoints, state, position
        self.mixture = open_stage_mixture(run.config, run.data_root, self.plan)
        self.config, self.stage = run.config, self.plan.stage
        self.spec = step_spec(run.config, stage)
        self.step = compiled_train_step(self.spec)
        self.sharding = batch_sharding(stage.mesh, microbatched=True)
        self.unread: tuple[Position, Any, float] | None = None
        self.times, self.peak = run.times, peak_flops(run.config.model.dtype)
        self.times.steps.pause()

    def run(self) -> None:
        """Trains to the end of the stage, with evaluation, log and checkpoints on the way."""
        run, plan, length = self.run_, self.plan, self.stage.sequence_length
        resumed = self.position.rows > 0
        self.times.start(plan.name, self.position.step)
        run.log.write(
            event("resume" if resumed else "stage_start", self.position)
            | {"model": to_dict(self.position.model)}
        )
        run.progress.start_stage(
            plan.name, plan.total_rows * length,
            done_tokens=self.position.rows * length, tokens_after=self.context.tokens_after,
        )  # fmt: skip
        host = data_host(self.context.mesh)
        batches = self.mixture.batches(
            self.position.rows, plan.batch_rows, host=host.index, num_hosts=host.count
        )
        with contextlib.closing(batches), self.times.split("step"):
            for start, batch in self._awaited(batches):
                self._profile()
                self._optimizer_step(start, batch)
                finished = self.position.rows >= plan.total_rows
                if self._passed(self.config.evaluation.every_tokens) or finished:
                    self._evaluate()
                if self._passed(self.config.checkpoint.every_tokens) or finished:
                    self._save()
            run.profiler.close()
            with self.times.split("checkpoint"):
                self.checkpoints.wait()
        log_once(run.log, "stage_end", self.position)
        run.progress.finish_stage()
        self.times.end_stage(plan.name, self.position.step)

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
        end = start + rows
        rate = self.plan.learning_rate(end)
        inputs = jax.device_put(StepInputs(*map(np.float32, (
            rate, self.stage.weight_decay, self.stage.entropy_weight, self.stage.rope_theta,
        ))))  # fmt: skip
        batch, step = place(batch, self.sharding), self.position.step + 1
        with (
            self.times.program(self.plan.name, step),
            jax.profiler.StepTraceAnnotation("train", step_num=step),
        ):
            self.state, metrics = self.step(self.state, batch, inputs)
        self.position = dataclasses.replace(
            self.position,
            step=self.position.step + 1,
            rows=end,
            tokens_seen=self.position.tokens_seen + rows * self.stage.sequence_length,
        )
        self._log_restarts(start)
        # Read one step late: the device computes this step while the host waits for the last.
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
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            raise FloatingPointError(
                f"stage {position.stage}, step {position.step}: loss {means['loss']}, gradient "
                f"norm {means['grad_norm']}. The newest checkpoint is from before this step; "
                "lower the learning rate, or set optimizer.clip_norm lower, and run again."
            )
        self.times.steps.step_ended(self._batch_tokens(position))
        record = self._record(position, rate, means)
        self.run_.progress.update(record)
        is_last = position.rows >= self.plan.total_rows
        if position.step % self.config.logging.every_steps == 0 or is_last:
            self.run_.log.write(record | self.times.window(position.stage, position.step))

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
        where = {"stage": self.position.stage, "step": self.position.step,
                 "tokens": self.position.tokens_seen}  # fmt: skip
        run = self.run_
        with self.times.split("evaluation"):
            for record in evaluate(
                self.config, run.data_root, self.plan, self.spec, self.state.params
            ):
                run.log.write(record | where | {"time": time.time()})

    def _save(self) -> None:
        # What is saved was finite: the loss and gradient of every step up to here have been read.
        self._drain()
        with self.times.split("checkpoint"):
            self.checkpoints.save(self.state, self.position, to_dict(self.config))


def event(name: str, position: Position) -> dict[str, Any]:
    """A record of something that happened to the run, and where it stood."""
    return {
        "kind": "event", "event": name, "time": time.time(), "stage": position.stage,
        "step": position.step, "tokens": position.tokens_seen,
    }  # fmt: skip


def log_once(log: RunLog, name: str, position: Position) -> None:
    """Logs an event unless it is there: the process may have died just before or after."""
    if not is_logged(log, name, position):
        log.write(event(name, position))


def is_logged(log: RunLog, name: str, position: Position) -> bool:
    """Whether the log holds this event of this step."""
    return any(
        record.get("event") == name and record["step"] == position.step for record in log.records()
    )


def stage_shape(config: Config, stage: Stage) -> ModelConfig:
    """The model of a stage as far as compiled programs depend on it: not on the RoPE base."""
    return dataclasses.replace(config.model, num_layers=stage.num_layers, num_loops=stage.num_loops)


def step_spec(config: Config, stage: StageContext) -> StepSpec:
    """What the compiled step of a stage depends on."""
    described = stage.plan.stage
    return StepSpec(
        stage_shape(config, described), config.optimizer, described.objective, described.prior,
        stage.layout.remat, stage.layout.gather, stage.mesh,
    )  # fmt: skip
