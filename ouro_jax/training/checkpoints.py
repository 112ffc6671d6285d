"""Checkpoints of a run: one Orbax folder per stage, `WORKDIR/<stage>/<step>/`.

A checkpoint holds the parameters, the optimizer state, the step and the random key, and as JSON
the position in the data, the tokens seen, the run's config and the model's own config as of the
stage. The last one of a finished stage is never deleted.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ouro_jax.config import STAGE_ORDER, ModelConfig, to_dict
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.hosts import barrier, from_first
from ouro_jax.training.state import TrainState, abstract_params

# 2: every stage goes on in its sources where the one before stopped, and may skip rows.
SCHEMA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: what is needed beside the arrays to go on exactly as if never stopped.

    `rows` are the global rows of the stage consumed, `skip_rows` the spans that the stage skips;
    `tokens_seen` counts the run's whole history.
    """

    stage: str
    step: int
    rows: int
    tokens_seen: int
    model: ModelConfig
    objective: str
    seed: int
    skip_rows: tuple[tuple[int, int], ...] = ()


class StageCheckpoints:
    """The checkpoints of one stage; saving is asynchronous. Close it, or use `with`."""

    def __init__(self, directory: str | Path, keep: int = 1, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only, read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )  # fmt: skip
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, state: TrainState, position: Position, config: dict[str, Any]) -> None:
        """Starts writing a checkpoint; returns when the arrays may be changed again."""
        rest = _rest(state)
        self.save_items(
            position, config,
            params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest),
        )  # fmt: skip

    def save_items(self, position: Position, config: dict[str, Any], **items: Any) -> None:
        """Starts writing the Orbax items given, with `position` and `config` as JSON beside."""
        meta = {"schema_version": SCHEMA_VERSION, "config": config, **_to_json(position)}
        self._manager.check_for_errors()
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self._manager.save(position.step, args=args, force=True)

    def wait(self) -> None:
        """Returns when what all processes saved is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        barrier(f"{self.directory.name} saved")

    def latest(self) -> Position | None:
        """The position of the newest whole checkpoint that process 0 sees, or None."""
        step = from_first(f"newest step of {self.directory.name}", self._manager.latest_step())
        return None if step is None else _read_position(self.directory / str(step))

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of `step`, laid out as `abstract` says. ConfigError if the shapes differ."""
        restored = self._restore(step, {"params": abstract.params, "rest": _rest(abstract)})
        return TrainState(params=restored["params"], **restored["rest"])

    def restore_params(self, abstract_params: Any, step: int) -> Any:
        """The parameters of `step` alone."""
        return self._restore(step, {"params": abstract_params})["params"]

    def has_optimizer(self, step: int) -> bool:
        """Whether `step` was saved by training, and not as parameters alone."""
        return (self.directory / str(step) / "rest").exists()

    def params_dtypes(self, step: int) -> Any:
        """The parameters' dtypes as saved, in the tree of the parameters."""
        metadata = self._manager.item_metadata(step)["params"].tree
        return jax.tree.map(lambda leaf: leaf.dtype, metadata)

    def _restore(self, step: int, abstract: dict[str, Any]) -> Any:
        metadata = self._manager.item_metadata(step)
        for item, target in abstract.items():
            _check_shapes(metadata[item].tree, target, self.directory / str(step))
        items = {name: ocp.args.StandardRestore(target) for name, target in abstract.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**items))


def latest_stage(path: str | Path) -> Path:
    """The stage folder that `path` means: itself, or the last stage begun of a workdir.

    Raises ConfigError if there is no checkpoint.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a workdir or one of its stages.")
    if stage_steps(path):
        return path
    begun = [path / name for name in STAGE_ORDER if stage_steps(path / name)]
    if not begun:
        raise ConfigError(
            f"{path}: no checkpoint here; expected a workdir of `ouro train` or one of its stages "
            f"({', '.join(STAGE_ORDER)}) with at least one finished save."
        )
    return begun[-1]


def load_position(path: str | Path) -> Position:
    """The position of the newest checkpoint of a workdir or stage."""
    stage = latest_stage(path)
    return _read_position(epath.Path(stage) / str(max(stage_steps(stage))))


def load_params(path: str | Path) -> tuple[Position, Any]:
    """Position and parameters of the newest checkpoint, whole on the first device, dtypes kept.

    `path` is a workdir or one of its stages.
    """
    stage = latest_stage(path)
    position = load_position(stage)
    with StageCheckpoints(stage, read_only=True) as checkpoints:
        dtypes = checkpoints.params_dtypes(position.step)
        target = jax.tree.map(
            lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
            abstract_params(position.model), dtypes,
        )  # fmt: skip
        return position, checkpoints.restore_params(target, position.step)


def save_params(directory: str | Path, params: Any, model: ModelConfig) -> None:
    """Writes parameters alone as a stage folder that `load_params` and `init_from` read."""
    position = Position(Path(directory).name, 0, 0, 0, model, "expected", 0)
    with StageCheckpoints(directory) as checkpoints:
        checkpoints.save_items(position, {}, params=ocp.args.StandardSave(params))


def stage_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a stage's folder; none if there is no such folder."""
    if not directory.is_dir():
        return []
    return [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]


def _rest(state: TrainState) -> dict[str, Any]:
    return {field: getattr(state, field) for field in ("opt_state", "step", "rng", "guard")}


def _to_json(position: Position) -> dict[str, Any]:
    return dataclasses.asdict(position) | {"model": to_dict(position.model)}


def _read_position(folder: epath.Path) -> Position:
    file = folder / "meta" / "metadata"
    try:
        meta = json.loads(file.read_text())
        if meta["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {meta['schema_version']}, expected {SCHEMA_VERSION}")
        names = {f.name for f in dataclasses.fields(Position)}
        fields = {name: meta[name] for name in names} | {
            "model": ModelConfig(**meta["model"]),
            "skip_rows": tuple((start, stop) for start, stop in meta["skip_rows"]),
        }
        return Position(**fields)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as a checkpoint's position: {error}") from error


def _check_shapes(metadata: Any, abstract: Any, folder: epath.Path) -> None:
    """Orbax answers a wrong shape with thousands of lines; this names the first one."""
    saved = _shapes(metadata)
    expected = _shapes(abstract)
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise ConfigError(
                f"{folder}: {name} has shape {saved.get(name)} in the checkpoint and "
                f"{expected.get(name)} in the config; set model.* and stages.*.num_layers to the "
                "checkpoint's, or choose another workdir or init_from."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def name(path):
        return "/".join(
            str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path
        )

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): tuple(leaf.shape) for path, leaf in leaves}
