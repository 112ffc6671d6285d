"""Where the parameters of a stage come from.

In this order: the stage's own newest whole checkpoint; the stage before, through this stage's
transition; `init_from`, likewise; fresh ones. Always read from disk, so that a run that was
killed between two stages goes on exactly as one that was not. A checkpoint is whole if all its
files are as they were written.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ouro_jax.config import GATE_OBJECTIVES, Config, ModelConfig, check_transition
from ouro_jax.data.interleave import Interleave
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.interop.huggingface import load_huggingface, read_json
from ouro_jax.interop.huggingface_config import QUANTIZATION_KEY, config_from_json
from ouro_jax.parallel.hosts import barrier, from_all, from_first
from ouro_jax.training.checkpoint_files import SUMS, all_steps, problems_of, set_aside, steps_of
from ouro_jax.training.checkpoints import (
    Position,
    StageCheckpoints,
    latest_stage,
    load_position,
    read_meta,
    read_position,
)
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.recovery import merged
from ouro_jax.training.state import StateFactory, TrainState
from ouro_jax.training.transitions import upcycle

# What a stage may not change, whatever it starts from.
FIXED = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")


def is_huggingface(path: str | epath.PathLike) -> bool:
    """Whether `path` is a folder in the Hugging Face format."""
    folder = Path(path)
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*"))


def check_start(config: Config, root: epath.Path) -> None:
    """Raises a ConfigError if the checkpoints that the run would start from are of another model
    than the config's, or of other rows: those under `root`, and `init_from` unless the run has
    left it behind. Reads no arrays."""
    for name, stage in config.stream():
        position = _readable_position(root / name)
        if position is not None:
            fields = (*FIXED, "num_layers")
            _check_same(config.stage_model(name), position.model, fields, str(root / name))
            _check_skips(StagePlan(name, stage), position, root / name)
    first = root / config.stream()[0][0]
    if config.init_from and not steps_of(first):
        _check_init_from(config)


def newest_meta(config: Config, root: epath.Path) -> tuple[epath.Path, dict[str, Any]] | None:
    """The newest checkpoint of the last stage begun that can be read, and what it says."""
    for name, _ in reversed(config.stream()):
        for step in reversed(steps_of(root / name)):
            with contextlib.suppress(ConfigError):
                return root / name / str(step), read_meta(root / name / str(step))
    return None


def _readable_position(stage: epath.Path) -> Position | None:
    """Of a stage's newest checkpoint; one that cannot be read is found out by `find_whole`."""
    steps = steps_of(stage)
    if steps:
        with contextlib.suppress(ConfigError):
            return read_position(stage / str(steps[-1]))
    return None


def find_whole(
    config: Config, root: epath.Path, broken: Callable[[epath.Path, str], None]
) -> Position | None:
    """The position of the newest whole checkpoint of the run; None for a run that has none.

    Every process reads its share of the files. Broken checkpoints after it are set aside, and
    `broken` hears where they are now and why, but only if there is a whole one: else a RunError
    names them all, and they stay where they are. A first one that was never finished is no
    checkpoint yet.
    """
    found = []
    for name, _ in reversed(config.stream()):
        for step in from_first("steps", all_steps(root / name)[::-1]):
            path = root / name / str(step)
            problems = sum(from_all("problems", problems_of(
                path, jax.process_index(), jax.process_count()
            )), [])  # fmt: skip
            if not problems:
                _set_aside(found, broken)
                return read_position(path)
            found.append((path, problems))
    if len(found) == 1 and not (found[0][0] / SUMS).exists():
        _set_aside(found, broken)
    elif found:
        lines = [f"  {problems[0]}" for _, problems in found]
        raise RunError(
            f"{root}: no checkpoint is whole:\n" + "\n".join(lines) + "\nNothing was moved or "
            "deleted. Put back what is missing from a copy, or name another workdir."
        )
    return None


def _set_aside(
    found: list[tuple[epath.Path, list[str]]], broken: Callable[[epath.Path, str], None]
) -> None:
    if jax.process_index() == 0:
        for path, problems in found:
            broken(set_aside(path), problems[0])
    barrier("broken checkpoints set aside")


def _check_init_from(config: Config) -> None:
    name, stage = config.stream()[0]
    if is_huggingface(config.init_from):
        source = _huggingface_config(config.init_from)
    else:
        source = load_position(config.init_from).model
    _check_same(config.model, source, FIXED, f"init_from = {config.init_from!r}")
    check_transition(stage.transition, source.num_layers, stage.num_layers, f"stages.{name}")


def _check_same(
    model: ModelConfig, theirs: ModelConfig, fields: tuple[str, ...], where: str
) -> None:
    for field in fields:
        ours, other = getattr(model, field), getattr(theirs, field)
        if ours != other:
            raise ConfigError(
                f"model.{field} = {ours}, but {where} has {other}; make them equal, or choose "
                "another workdir or init_from."
            )


def _check_skips(plan: StagePlan, position: Position, folder: epath.Path) -> None:
    """What lies behind a checkpoint cannot be skipped, or not skipped, any more."""
    behind = Interleave(plan.stage.mixture, position.skip_rows).passed(position.rows)
    ours, theirs = (
        tuple(span for span in spans if span[0] < behind)
        for spans in (merged(plan.stage.skip_rows), merged(position.skip_rows))
    )
    if ours != theirs:
        raise ConfigError(
            f"stages.{plan.name}.skip_rows: the spans that begin before row {behind:,} are {ours}, "
            f"but {folder} was trained with {theirs} up to there; only later rows can be chosen "
            "anew. Set them back, or choose another workdir."
        )


def fresh_state(factory: StateFactory, config: Config, name: str) -> tuple[TrainState, Position]:
    """A state of random parameters at the start of a run."""
    model = config.stage_model(name)
    position = Position(
        name, 0, 0, 0, model, factory.objective, config.seed, config.stages[name].skip_rows
    )
    return factory.init(config.seed), position


def state_from(
    source: str | epath.PathLike, factory: StateFactory, config: Config, name: str
) -> tuple[TrainState, Position]:
    """The state of a stage that starts from another stage's folder or a Hugging Face folder."""
    if is_huggingface(source):
        before, state = _from_huggingface(source, config, factory.mesh)
    else:
        before, state = _from_stage(latest_stage(source), config, factory.mesh)
    stage = config.stages[name]
    check_transition(stage.transition, before.model.num_layers, stage.num_layers, f"stages.{name}")
    factor = stage.num_layers // before.model.num_layers
    keeps = before.objective not in GATE_OBJECTIVES and factory.objective not in GATE_OBJECTIVES
    keeps = keeps and not stage.reset_optimizer and state.opt_state is not None

    def transit(tree: Any) -> Any:
        return tree if factor == 1 else upcycle(tree, factor, stage.transition)

    target = factory.shardings()
    params = jax.jit(transit, out_shardings=target.params)(state.params)
    if keeps:
        opt_state = jax.jit(transit, out_shardings=target.opt_state)(state.opt_state)
    else:
        opt_state = factory.fresh_optimizer(params)
    position = dataclasses.replace(
        before, stage=name, rows=0, model=config.stage_model(name),
        objective=factory.objective, seed=config.seed, skip_rows=stage.skip_rows,
    )  # fmt: skip
    guard = factory.fresh_guard()
    return state.replace(params=params, opt_state=opt_state, guard=guard), position


def _from_stage(folder: epath.Path, config: Config, mesh: Mesh) -> tuple[Position, TrainState]:
    before = load_position(folder)
    with StageCheckpoints(folder, read_only=True) as checkpoints:
        factory = StateFactory(before.model, config.optimizer, before.objective, mesh)
        if checkpoints.has_optimizer(before.step):
            return before, checkpoints.restore(factory.abstract(), before.step)
        params = checkpoints.restore_params(factory.abstract().params, before.step)
    return before, _without_optimizer(params, factory, config.seed)


def _from_huggingface(
    folder: str | epath.PathLike, config: Config, mesh: Mesh
) -> tuple[Position, Any]:
    factory = StateFactory(_huggingface_config(folder), config.optimizer, "expected", mesh)
    layout: Any = flatten_dict(factory.shardings().params)

    def place(path: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
        # Training keeps float32 parameters whatever the file holds. Of every process each device
        # takes its own part: device_put would compare the whole leaf among all processes.
        return jax.make_array_from_callback(
            leaf.shape, layout[path], lambda index: leaf[index].astype(np.float32)
        )

    model, params = load_huggingface(Path(folder), place)
    position = Position("", 0, 0, 0, model, "expected", config.seed)
    return position, _without_optimizer(params, factory, config.seed)


def _huggingface_config(folder: str | epath.PathLike) -> ModelConfig:
    file = Path(folder) / "config.json"
    fields = read_json(file)
    if fields.get(QUANTIZATION_KEY) is not None:
        raise ConfigError(
            f"init_from = {str(folder)!r}: {QUANTIZATION_KEY} = {fields[QUANTIZATION_KEY]!r}: "
            "expected float weights: training cannot start from quantised ones. Name the "
            "checkpoint that they were made from."
        )
    return config_from_json(fields, None, str(file))


def _without_optimizer(params: Any, factory: StateFactory, seed: int) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed))
    step = jax.device_put(np.zeros((), np.int32), factory.shardings().step)
    rng = jax.device_put(key, factory.shardings().rng)
    return TrainState(params, None, step, rng, factory.fresh_guard())
