"""What a run and a stage hand to those who work on them, and how their records are placed."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from etils import epath
from jax.sharding import Mesh

from ouro_jax.config import Config, ModelConfig, Stage
from ouro_jax.data.bad_rows import BadRows
from ouro_jax.training.checkpoints import Position
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.events import EventLog
from ouro_jax.training.layout import Layout
from ouro_jax.training.profiling import Profiler
from ouro_jax.training.progress import Progress
from ouro_jax.training.run_log import RunLog
from ouro_jax.training.step import StepSpec
from ouro_jax.training.timing import RunTimes
from ouro_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the stages of a run share: `config` skips what the run has skipped by itself, too;
    `described` is the config as its file says. Checkpoints lie under `root`."""

    config: Config
    described: dict[str, Any]
    workdir: Path
    root: epath.Path
    data_root: epath.Path
    log: RunLog
    events: EventLog
    progress: Progress
    times: RunTimes
    profiler: Profiler
    watchdog: Watchdog
    bad_rows: BadRows


@dataclasses.dataclass(frozen=True)
class StageContext:
    """A stage, how it is laid out, and how many tokens of later stages follow it."""

    plan: StagePlan
    layout: Layout
    mesh: Mesh
    tokens_after: int


def where(position: Position) -> dict[str, Any]:
    """What places a record in the run."""
    return {"stage": position.stage, "step": position.step, "tokens": position.tokens_seen}


def event(name: str, position: Position) -> dict[str, Any]:
    """A record of something that happened to the run, and where it stood."""
    return {"kind": "event", "event": name, "time": time.time()} | where(position)


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
