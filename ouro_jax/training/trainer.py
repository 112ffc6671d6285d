"""The trainer: runs or continues a config's stages, one after the other, in one workdir."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ouro_jax.config import Config, to_dict
from ouro_jax.data.embedded import SOURCES, build_embedded
from ouro_jax.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.hosts import barrier, require_same, require_shared
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.training.checkpoints import StageCheckpoints, stage_steps
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.evaluation import ngram_baselines
from ouro_jax.training.layout_choice import choose_layout
from ouro_jax.training.profiling import Profiler
from ouro_jax.training.progress import Progress
from ouro_jax.training.run_log import RunLog
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.stage_run import (
    RunContext,
    StageContext,
    StageRun,
    is_logged,
    log_once,
    stage_shape,
)
from ouro_jax.training.start import check_start, fresh_state, is_huggingface, state_from
from ouro_jax.training.state import StateFactory
from ouro_jax.training.timing import RunTimes


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Runs or continues the whole stream of stages; returns what `ouro train --json` prints.

    Everything that can be wrong with the config, the data or `init_from` is a ConfigError before
    the first compilation. Every process of the run calls this; the first one alone writes the log.
    """
    workdir = Path(workdir)
    require_same("config", to_dict(config) | {"version of jax": jax.__version__})
    stages = _plan_stages(config)
    data_root = _check(config, workdir)
    is_first = jax.process_index() == 0
    with (
        contextlib.closing(RunLog(
            workdir, tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project, enabled=is_first,
        )) as log,
        Progress(enabled=is_first) as progress,
        RunTimes(workdir, progress.message, enabled=is_first) as times,
        contextlib.closing(Profiler(
            config.profile, workdir, progress.message, enabled=is_first
        )) as profiler,
    ):  # fmt: skip
        run = RunContext(config, workdir, data_root, log, progress, times, profiler)
        source = config.init_from or None
        for stage in stages:
            with use_mesh(stage.mesh):
                train_stage(run, stage, source)
            source = workdir / stage.plan.name
        return _finish(run)


def _plan_stages(config: Config) -> list[StageContext]:
    """The stages in order, each with its layout; ConfigErrors where one does not fit."""
    stages, after = [], 0
    for name, described in reversed(config.stream()):
        plan, layout = StagePlan(name, described), choose_layout(config, name)
        stages.append(StageContext(plan, layout, make_mesh(layout.mesh), after))
        after += plan.total_rows * described.sequence_length
    return stages[::-1]


def _check(config: Config, workdir: Path) -> epath.Path:
    """Refuses what cannot run, then makes the workdir; returns the root of the data."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir}: this is a file; name a folder.")
    check_start(config, workdir)
    is_first = jax.process_index() == 0
    if is_first:
        prepare_data(config)
    barrier("data prepared")
    data_root = prepare_data(config)
    for name, stage in config.stream():
        open_stage_mixture(config, data_root, StagePlan(name, stage))
    _check_tokenizer(config, data_root)
    require_shared(workdir)
    if is_first:
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
        (workdir / "tokenizer.json").write_bytes((data_root / "tokenizer.json").read_bytes())
    return data_root


def train_stage(run: RunContext, stage: StageContext, source: str | Path | None) -> None:
    """Trains what is left of one stage, from its own checkpoint or from `source`."""
    plan, config = stage.plan, run.config
    factory = StateFactory(
        stage_shape(config, plan.stage), config.optimizer, plan.stage.objective, stage.mesh
    )
    with StageCheckpoints(run.workdir / plan.name, config.checkpoint.keep) as checkpoints:
        position = checkpoints.latest()
        if position is not None and position.rows >= plan.total_rows:
            run.progress.message(f"{plan.name}: finished at step {position.step:,}.")
            log_once(run.log, "stage_end", position)
            return
        if position is not None:
            state = checkpoints.restore(factory.abstract(), position.step)
            # It may skip other rows from here on than it meant to when it was saved.
            position = dataclasses.replace(position, skip_rows=plan.stage.skip_rows)
        elif source is None:
            state, position = fresh_state(factory, config, plan.name)
        else:
            state, position = state_from(source, factory, config, plan.name)
        run.log.rewind(position.step)
        StageRun(run, stage, checkpoints, state, position).run()


def _finish(run: RunContext) -> dict[str, Any]:
    """Writes the baselines and the end of the run; returns its summary."""
    with StageCheckpoints(run.workdir / run.config.stream()[-1][0], read_only=True) as checkpoints:
        position = checkpoints.latest()
    assert position is not None, "the last stage has just been trained"
    wanted = run.config.evaluation.ngram_baselines and jax.process_index() == 0
    if wanted and not is_logged(run.log, "finished", position):
        for record in ngram_baselines(run.config, run.data_root):
            run.log.write(record | {"step": position.step})
    barrier("baselines", timeout=3600)
    log_once(run.log, "finished", position)
    return {
        "workdir": str(run.workdir),
        "finished": True,
        "stage": position.stage,
        "step": position.step,
        "tokens": position.tokens_seen,
    }


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
