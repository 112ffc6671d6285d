"""The trainer: runs or continues a config's stages, one after the other, in one workdir."""

import contextlib
import json
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ouro_jax.config import Config, to_dict
from ouro_jax.data.bad_rows import BadRows
from ouro_jax.data.embedded import SOURCES, build_embedded
from ouro_jax.data.tasks.rows import build_task
from ouro_jax.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.hosts import barrier, from_first, require_same, require_shared
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.training.checkpoint_files import absolute, steps_of
from ouro_jax.training.checkpoints import load_position
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.drift import check_drift
from ouro_jax.training.evaluation import ngram_baselines
from ouro_jax.training.events import EventLog, read_events, skipped_rows
from ouro_jax.training.layout_choice import choose_layout
from ouro_jax.training.profiling import Profiler
from ouro_jax.training.progress import Progress
from ouro_jax.training.recovery import skipping
from ouro_jax.training.run_log import RunLog
from ouro_jax.training.stage_context import (
    RunContext,
    StageContext,
    is_logged,
    log_once,
    where,
)
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.stage_trainer import StageTrainer, find_in
from ouro_jax.training.start import check_start, is_huggingface, newest_meta
from ouro_jax.training.timing import RunTimes, start_clock
from ouro_jax.training.watchdog import Watchdog

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def train(
    config: Config, workdir: str | Path, allow_config_change: Iterable[str] = ()
) -> dict[str, Any]:
    """Runs or continues the whole stream of stages; returns what `ouro train --json` prints.

    Everything that can be wrong with the config, the data or `init_from` is a ConfigError before
    the first compilation. Every process of the run calls this, in its main thread; the first one
    alone writes the logs. Raises Stopped when it was asked to stop and has saved.
    """
    workdir = Path(workdir)
    require_same("config", to_dict(config) | {"version of jax": jax.__version__})
    is_first = jax.process_index() == 0
    stacks = workdir / "stacks" / f"process_{jax.process_index()}.txt"
    with (
        contextlib.closing(EventLog(workdir, enabled=is_first)) as events,
        Watchdog(config.deadlines, stacks, events.ended) as watchdog,
        events.attempt(),
    ):
        return _train(config, workdir, allow_config_change, events, watchdog)


def _train(
    config: Config, workdir: Path, allowed: Iterable[str], events: EventLog, watchdog: Watchdog
) -> dict[str, Any]:
    described, is_first = to_dict(config), jax.process_index() == 0
    config = _with_recorded_skips(config, workdir)
    stages = _plan_stages(config)
    root = absolute(config.checkpoint.directory or workdir)
    data_root = _check(config, workdir, root, allowed, described, events)
    with (
        contextlib.closing(RunLog(
            workdir, tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project, enabled=is_first,
        )) as log,
        Progress(enabled=is_first) as progress,
        RunTimes(workdir, progress.message, enabled=is_first, entered=watchdog.enter) as times,
        contextlib.closing(Profiler(
            config.profile, workdir, progress.message, enabled=is_first
        )) as profiler,
    ):  # fmt: skip
        run = RunContext(config, described, workdir, root, data_root, log, events, progress,
                         times, profiler, watchdog, _bad_rows(config, workdir, events))  # fmt: skip
        found = find_in(run)
        start_clock().mark("verify")
        begins = where(found) if found else {"stage": stages[0].plan.name, "step": 0, "tokens": 0}
        events.write("start", **begins, **_where_it_runs(), seconds=start_clock().seconds)
        source = config.init_from or None
        for stage in stages:
            if found is None or found.stage == stage.plan.name:
                with use_mesh(stage.mesh):
                    run = StageTrainer(run, stage, source).train(found)
                found = None
            else:
                _tell_finished(run, stage.plan)
            source = root / stage.plan.name
        return _finish(run)


def _where_it_runs() -> dict[str, Any]:
    return {
        "processes": jax.process_count(), "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }  # fmt: skip


def _bad_rows(config: Config, workdir: Path, events: EventLog) -> BadRows:
    """The unreadable rows of the run, those of earlier attempts counted."""

    def tell(row: dict[str, Any]) -> None:
        print(f"unreadable row skipped: {row}", file=sys.stderr, flush=True)
        events.write("bad_row", **row)

    known = [event for event in read_events(workdir) if event["kind"] == "bad_row"]
    return BadRows(config.data.max_bad_rows, tell, known)


def _with_recorded_skips(config: Config, workdir: Path) -> Config:
    """The config, with the rows that earlier attempts have skipped skipped from the start."""
    for name, _ in config.stream():
        spans = from_first(f"skipped rows of {name}", skipped_rows(workdir, name))
        config = skipping(config, name, tuple((start, stop) for start, stop in spans))
    return config


def _plan_stages(config: Config) -> list[StageContext]:
    """The stages in order, each with its layout; ConfigErrors where one does not fit."""
    stages, after = [], 0
    for name, described in reversed(config.stream()):
        plan, layout = StagePlan(name, described), choose_layout(config, name)
        stages.append(StageContext(plan, layout, make_mesh(layout.mesh), after))
        after += plan.total_rows * described.sequence_length
    return stages[::-1]


def _check(
    config: Config, workdir: Path, root: epath.Path, allowed: Iterable[str],
    described: dict[str, Any], events: EventLog,
) -> epath.Path:  # fmt: skip
    """Refuses what cannot run, then makes the workdir; returns the root of the data."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir}: this is a file; name a folder.")
    check_start(config, root)
    newest = newest_meta(config, root)
    now = json.loads(json.dumps(described))
    path, meta = newest or (root, {"config": now})
    changes = check_drift(meta["config"], now, allowed, str(path))
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
        (workdir / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        (workdir / "tokenizer.json").write_bytes((data_root / "tokenizer.json").read_bytes())
    start_clock().mark("data")
    if changes:
        events.write("config_change", changes=changes)
    return data_root


def _tell_finished(run: RunContext, plan: StagePlan) -> None:
    """Of a stage before the one that the run goes on in; its checkpoints are not needed."""
    steps = steps_of(run.root / plan.name)
    step = f" at step {steps[-1]:,}" if steps else ""
    run.progress.message(f"{plan.name}: finished{step}.")


def _finish(run: RunContext) -> dict[str, Any]:
    """Writes the baselines and the end of the run; returns its summary."""
    position = load_position(run.root / run.config.stream()[-1][0])
    wanted = run.config.evaluation.ngram_baselines and jax.process_index() == 0
    if wanted and not is_logged(run.log, "finished", position):
        for record in ngram_baselines(run.config, run.data_root, run.bad_rows):
            run.log.write(record | {"step": position.step})
    barrier("baselines", timeout=3600)
    if not is_logged(run.log, "finished", position):
        run.events.write("finished", **where(position))
    log_once(run.log, "finished", position)
    return {
        "workdir": str(run.workdir),
        "finished": True,
        "stage": position.stage,
        "step": position.step,
        "tokens": position.tokens_seen,
    }


def prepare_data(config: Config) -> epath.Path:
    """The data root of a run; makes embedded text or a task first where the config asks for it."""
    lengths = sorted({stage.sequence_length for _, stage in config.stream()})
    if config.data.task:
        return epath.Path(build_task(config.data.root, config.data.task, lengths))
    if not config.data.embedded_bytes:
        return epath.Path(config.data.root)
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
    origin = epath.Path(config.init_from)
    workdir = origin.parent if steps_of(origin) else origin
    for theirs in (origin / "tokenizer.json", workdir / "tokenizer.json"):
        if theirs.is_file() and tokenizer_hash(theirs) != tokenizer_hash(path):
            raise ConfigError(
                f"init_from = {config.init_from!r} was trained with {theirs}, which differs from "
                f"{path}; prepare the data with that tokenizer."
            )
