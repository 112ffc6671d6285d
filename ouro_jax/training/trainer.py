"""The trainer: runs or continues a config's stages, one after the other, in one workdir."""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ouro_jax.config import Config, ConfigError, ModelConfig, Stage, to_dict
from ouro_jax.data.embedded import SOURCES, build_embedded
from ouro_jax.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from ouro_jax.parallel.devices import peak_flops
from ouro_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    check_model_fits,
    make_mesh,
    use_mesh,
)
from ouro_jax.training.checkpoints import Position, StageCheckpoints, stage_steps
from ouro_jax.training.curriculum import StagePlan, microbatch_rows
from ouro_jax.training.evaluation import evaluate, ngram_baselines, place
from ouro_jax.training.progress import Progress
from ouro_jax.training.run_log import RunLog
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.start import check_start, fresh_state, is_huggingface, state_from
from ouro_jax.training.state import StateFactory, TrainState
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Runs or continues the whole stream of stages; returns what `ouro train --json` prints.

    Everything that can be wrong with the config, the data or `init_from` is a ConfigError before
    the first compilation.
    """
    run = _Run(config, Path(workdir))
    is_first = jax.process_index() == 0
    with (
        use_mesh(run.mesh),
        contextlib.closing(RunLog(
            run.workdir, tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project, enabled=is_first,
        )) as run.log,
        Progress(enabled=is_first) as run.progress,
    ):  # fmt: skip
        source = config.init_from or None
        for plan in run.plans:
            run.train_stage(plan, source)
            source = run.workdir / plan.name
        return run.finish()


class _Run:
    """One run's config, mesh, data and outputs."""

    log: RunLog
    progress: Progress

    def __init__(self, config: Config, workdir: Path):
        self.config, self.workdir = config, workdir
        self.plans = [StagePlan(name, stage) for name, stage in config.stream()]
        self.mesh = make_mesh(config.mesh)
        self.microbatch_rows = {}
        for plan in self.plans:
            self.microbatch_rows[plan.name] = microbatch_rows(
                plan, batch_shards(self.mesh), config.layout.microbatch_rows
            )
            check_model_fits(
                config.stage_model(plan.name), plan.stage.sequence_length, self.mesh,
                f"stages.{plan.name}",
            )  # fmt: skip
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"--workdir={workdir}: this is a file; name a folder.")
        check_start(config, workdir)
        self.data_root = prepare_data(config)
        for plan in self.plans:
            open_stage_mixture(config, self.data_root, plan)
        _check_tokenizer(config, self.data_root)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
        tokenizer = (self.data_root / "tokenizer.json").read_bytes()
        (workdir / "tokenizer.json").write_bytes(tokenizer)

    def train_stage(self, plan: StagePlan, source: str | Path | None) -> None:
        """Trains what is left of one stage, from its own checkpoint or from `source`."""
        factory = StateFactory(
            self.shape(plan.stage), self.config.optimizer, plan.stage.objective, self.mesh
        )
        with StageCheckpoints(self.workdir / plan.name, self.config.checkpoint.keep) as checkpoints:
            position = checkpoints.latest()
            if position is not None and position.rows >= plan.total_rows:
                self.progress.message(f"{plan.name}: finished at step {position.step:,}.")
                self.log_once("stage_end", position)
                return
            if position is not None:
                state = checkpoints.restore(factory.abstract(), position.step)
                # It may skip other rows from here on than it meant to when it was saved.
                position = dataclasses.replace(position, skip_rows=plan.stage.skip_rows)
            elif source is None:
                state, position = fresh_state(factory, self.config, plan.name)
            else:
                state, position = state_from(source, factory, self.config, plan.name)
            self.log.rewind(position.step)
            _StageRun(self, plan, checkpoints, state, position).run()

    def finish(self) -> dict[str, Any]:
        """Writes the baselines and the end of the run; returns its summary."""
        with StageCheckpoints(self.workdir / self.plans[-1].name, read_only=True) as checkpoints:
            position = checkpoints.latest()
        assert position is not None, "the last stage has just been trained"
        if self.config.evaluation.ngram_baselines and not self._is_logged("finished", position):
            for record in ngram_baselines(self.config, self.data_root):
                self.log.write(record | {"step": position.step})
        self.log_once("finished", position)
        return {
            "workdir": str(self.workdir),
            "finished": True,
            "stage": position.stage,
            "step": position.step,
            "tokens": position.tokens_seen,
        }

    def log_once(self, name: str, position: Position) -> None:
        """Logs an event unless it is there: the process may have died just before or after."""
        if not self._is_logged(name, position):
            self.log.write(event(name, position))

    def _is_logged(self, name: str, position: Position) -> bool:
        return any(
            record.get("event") == name and record["step"] == position.step
            for record in self.log.records()
        )

    def tokens_after(self, plan: StagePlan) -> int:
        """Tokens of the stages that come after `plan`."""
        later = self.plans[self.plans.index(plan) + 1 :]
        return sum(other.total_rows * other.stage.sequence_length for other in later)

    def shape(self, stage: Stage) -> ModelConfig:
        """The model of a stage as far as compiled programs depend on it: not on the RoPE base."""
        return dataclasses.replace(
            self.config.model, num_layers=stage.num_layers, num_loops=stage.num_loops
        )


class _StageRun:
    """The loop over one stage's steps."""

    def __init__(self, run: _Run, plan: StagePlan, checkpoints: StageCheckpoints,
                 state: TrainState, position: Position):  # fmt: skip
        self.run_, self.plan, self.checkpoints = run, plan, checkpoints
        self.state, self.position = state, position
        self.mixture = open_stage_mixture(run.config, run.data_root, plan)
        self.config, self.stage = run.config, plan.stage
        self.spec = StepSpec(
            run.shape(plan.stage), self.config.optimizer, self.stage.objective, self.stage.prior,
            _remat(self.config.layout.remat), run.mesh,
        )  # fmt: skip
        self.step = compiled_train_step(self.spec)
        self.sharding = batch_sharding(run.mesh, microbatched=True)
        self.unread: tuple[Position, Any, float] | None = None
        # When the step before was read; None where compilation or a pause would be counted.
        self.clock: float | None = None

    def run(self) -> None:
        """Trains to the end of the stage, with evaluation, log and checkpoints on the way."""
        run, plan, length = self.run_, self.plan, self.stage.sequence_length
        resumed = self.position.rows > 0
        run.log.write(
            event("resume" if resumed else "stage_start", self.position)
            | {"model": to_dict(self.position.model)}
        )
        run.progress.start_stage(
            plan.name, plan.total_rows * length,
            done_tokens=self.position.rows * length, tokens_after=run.tokens_after(plan),
        )  # fmt: skip
        batches = self.mixture.batches(
            self.position.rows, plan.batch_rows,
            host=jax.process_index(), num_hosts=jax.process_count(),
        )  # fmt: skip
        with contextlib.closing(batches):
            for start, batch in batches:
                self._optimizer_step(start, batch)
                finished = self.position.rows >= plan.total_rows
                if self._passed(self.config.evaluation.every_tokens) or finished:
                    self._evaluate()
                if self._passed(self.config.checkpoint.every_tokens) or finished:
                    self._save()
        self.checkpoints.wait()
        run.log_once("stage_end", self.position)
        run.progress.finish_stage()

    def _optimizer_step(self, start: int, batch: Any) -> None:
        rows = self.plan.batch_rows(start)
        microbatches = rows // self.run_.microbatch_rows[self.plan.name]
        batch = jax.tree.map(lambda x_BL: x_BL.reshape(microbatches, -1, x_BL.shape[-1]), batch)
        end = start + rows
        rate = self.plan.learning_rate(end)
        inputs = jax.device_put(StepInputs(*map(np.float32, (
            rate, self.stage.weight_decay, self.stage.entropy_weight, self.stage.rope_theta,
        ))))  # fmt: skip
        self.state, metrics = self.step(self.state, place(batch, self.sharding), inputs)
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
        record = self._record(position, rate, means)
        self.run_.progress.update(record)
        is_last = position.rows >= self.plan.total_rows
        if position.step % self.config.logging.every_steps == 0 or is_last:
            self.run_.log.write(record)

    def _record(self, position: Position, rate: float, means: dict[str, Any]) -> dict[str, Any]:
        """The `train` record of the step that ended at `position`."""
        now, before = time.perf_counter(), self.clock
        self.clock = now
        length = self.stage.sequence_length
        batch_tokens = self.plan.batch_rows(position.rows - 1) * length
        flops = self.plan.flops_per_token(position.model)
        tokens_per_second = batch_tokens / (now - before) if before else None
        peak = peak_flops(self.spec.model.dtype)
        given = self.mixture.order.given(position.rows)
        return {
            "kind": "train", "time": time.time(), "stage": position.stage, "step": position.step,
            "tokens": position.tokens_seen, "learning_rate": rate, "batch_tokens": batch_tokens,
            "source_tokens": {source: rows * length for source, rows in given.items()},
            "tokens_per_second": tokens_per_second,
            "peak_share": tokens_per_second * flops / peak if tokens_per_second else None,
            **means,
        }  # fmt: skip

    def _passed(self, every_tokens: int) -> bool:
        length = self.stage.sequence_length
        after = self.position.rows * length
        before = after - self.plan.batch_rows(self.position.rows - 1) * length
        return after // every_tokens > before // every_tokens

    def _evaluate(self) -> None:
        self._read_metrics()
        where = {"stage": self.position.stage, "step": self.position.step,
                 "tokens": self.position.tokens_seen}  # fmt: skip
        run = self.run_
        for record in evaluate(self.config, run.data_root, self.plan, self.spec, self.state.params):
            run.log.write(record | where | {"time": time.time()})
        self.clock = None

    def _save(self) -> None:
        # What is saved was finite: the loss and gradient of every step up to here have been read.
        self._read_metrics()
        self.checkpoints.save(self.state, self.position, to_dict(self.config))
        self.clock = None


def prepare_data(config: Config) -> epath.Path:
    """The data root of a run; makes the embedded text first where the config asks for it."""
    if not config.data.embedded_bytes:
        return epath.Path(config.data.root)
    lengths = sorted({stage.sequence_length for _, stage in config.stream()})
    root = build_embedded(
        config.data.root,
        vocab_size=config.model.vocab_size,
        sequence_lengths=dict.fromkeys(SOURCES, lengths),
        max_bytes_per_source=config.data.embedded_bytes,
    )
    return epath.Path(root)


def event(name: str, position: Position) -> dict[str, Any]:
    """A record of something that happened to the run, and where it stood."""
    return {
        "kind": "event", "event": name, "time": time.time(), "stage": position.stage,
        "step": position.step, "tokens": position.tokens_seen,
    }  # fmt: skip


def _check_tokenizer(config: Config, data_root: epath.Path) -> None:
    path = data_root / "tokenizer.json"
    size = vocabulary_size(load_tokenizer(path))
    if size > config.model.vocab_size:
        raise ConfigError(
            f"{path} has {size:,} entries, more than model.vocab_size = "
            f"{config.model.vocab_size:,}; set it to at least {size}."
        )
    if not config.init_from or is_huggingface(config.init_from):
        return
    # A run's tokenizer lies in its workdir, a converted checkpoint's in its own folder.
    origin = Path(config.init_from)
    workdir = origin.parent if stage_steps(origin) else origin
    for theirs in (origin / "tokenizer.json", workdir / "tokenizer.json"):
        if theirs.is_file() and tokenizer_hash(theirs) != tokenizer_hash(path):
            raise ConfigError(
                f"init_from = {config.init_from!r} was trained with {theirs}, which differs from "
                f"{path}; prepare the data with that tokenizer."
            )


def _remat(policy: str) -> str:
    """`auto` recomputes layers: inside scans that costs no time on CPU, at an 8th of the memory."""
    return "layer" if policy == "auto" else policy
