"""Checkpoints of a run: one Orbax folder per stage, `<stage>/<step>/`, and beside its files their
checksums.

A checkpoint holds the parameters, the optimizer state, the step, the random key and the guard of
the steps, and as JSON the position in the data, the tokens seen, the run's config and the model's
own config as of the stage. Temporary ones are deleted by policy, permanent ones never.
"""

import contextlib
import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ouro_jax.config import STAGE_ORDER, ModelConfig, to_dict
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.parallel.hosts import barrier
from ouro_jax.training.checkpoint_files import (
    META,
    absolute,
    checkpoint_root,
    delete,
    delete_unfinished,
    list_stage,
    problems_of,
    prunable,
    steps_of,
    write_sums,
)
from ouro_jax.training.state import TrainState, abstract_params

# 3: the state has a guard, and checksums lie beside it.
SCHEMA_VERSION = 3
# A host that others wait for while a checkpoint is written is not waited for longer.
SAVE_SECONDS = 1200
# More than Orbax keeps.
ERRORS_OF_A_SAVE = 8


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


class SaveError(RunError):
    """A checkpoint could not be written; those before it are as they were."""


class StageCheckpoints:
    """The checkpoints of one stage; saving is asynchronous. Close it, or use `with`.

    A save is over when `poll` or `wait` says so: then its checksums are written, and of the
    temporary checkpoints of the stage only the newest `keep` are left.
    """

    def __init__(self, directory: str | epath.PathLike, keep: int = 1, read_only: bool = False):
        self.directory, self._keep = absolute(directory), keep
        options = ocp.CheckpointManagerOptions(
            create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
        )  # fmt: skip
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._saving: int | None = None
        self._finishing: Future[None] | None = None
        self._failed_steps: set[int] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checksums")

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self._worker.shutdown()
        self._forget_errors()
        self._manager.close()
        self._delete_failed()

    @property
    def is_saving(self) -> bool:
        """Whether a save is not over yet."""
        return self._saving is not None

    def save(
        self, state: TrainState, position: Position, config: dict[str, Any], *, permanent: bool
    ) -> None:
        """Starts writing a checkpoint; returns when the arrays may be changed again.

        Waits for a save that is not over. Raises SaveError if that one or this one fails.
        """
        self.save_items(
            position, config, permanent=permanent, params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(_rest(state)),
        )  # fmt: skip

    def save_items(
        self, position: Position, config: dict[str, Any], *, permanent: bool = True, **items: Any
    ) -> None:
        """Starts writing the Orbax items given, with `position` and `config` as JSON beside."""
        self.settle()
        if self._failed_steps:
            self._forget_errors()
        meta = {"schema_version": SCHEMA_VERSION, "permanent": permanent, "config": config}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta | _to_json(position)), **items)
        try:
            self._manager.save(position.step, args=args, force=True)
        except (OSError, ValueError) as error:  # what TensorStore makes of a full disk
            raise self._failed(position.step, error) from error
        self._saving = position.step

    def poll(self) -> bool:
        """Whether a save is over since the last call. Raises SaveError if it failed."""
        if self._saving is None:
            return False
        if self._finishing is None:
            if self._manager.is_saving_in_progress():
                return False
            self._finishing = self._worker.submit(self._finish, self._saving)
        if not self._finishing.done():
            return False
        self.settle()
        return True

    def wait(self) -> None:
        """Returns when what all processes saved is over; raises SaveError if it failed."""
        self.settle()
        barrier(f"{self.directory.name} saved")

    def settle(self) -> None:
        """Returns when what this process saved is over; raises SaveError if it failed."""
        step, finishing = self._saving, self._finishing
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            (finishing or self._worker.submit(self._finish, step)).result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error
        finally:
            self._saving = self._finishing = None

    def _finish(self, step: int) -> None:
        """Makes the checkpoint whole, in a thread: hashing takes a second for each gigabyte."""
        self._manager.check_for_errors()
        if jax.process_index() > 0:
            return
        write_sums(self.directory / str(step))
        self._delete_failed()
        delete(prunable(list_stage(self.directory), self._keep))

    def _failed(self, step: int, error: Exception) -> SaveError:
        self._failed_steps.add(step)
        self._delete_failed()
        first = str(error).split("\n")[0][:300].rstrip(".")
        return SaveError(f"{self.directory / str(step)}: cannot be saved: {first}.")

    def _delete_failed(self) -> None:
        """What failed saves have written may be what fills the disk.

        Orbax leaves writes under way behind, and their files appear a little later; so once more
        after the next save.
        """
        if jax.process_index() == 0 and self._failed_steps:
            with contextlib.suppress(OSError):
                delete_unfinished(self.directory, self._failed_steps)

    def _forget_errors(self) -> None:
        """Orbax raises one error of a failed save; the others it would raise at the next one."""
        checkpointer: Any = self._manager._checkpointer  # its errors cannot be reached otherwise
        for waits in (self._manager, checkpointer):
            for _ in range(ERRORS_OF_A_SAVE):
                try:
                    waits.wait_until_finished()
                    break
                except (OSError, ValueError, RuntimeError):
                    continue

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


def latest_stage(path: str | epath.PathLike) -> epath.Path:
    """The stage folder that `path` means: itself, or the last stage begun of a workdir.

    Raises ConfigError if there is no checkpoint.
    """
    path = absolute(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a workdir or one of its stages.")
    if steps_of(path):
        return path
    root = checkpoint_root(path)
    begun = [root / name for name in STAGE_ORDER if steps_of(root / name)]
    if not begun:
        raise ConfigError(
            f"{root}: no checkpoint here; expected a workdir of `ouro train` or one of its stages "
            f"({', '.join(STAGE_ORDER)}) with at least one finished save."
        )
    return begun[-1]


def load_position(path: str | epath.PathLike) -> Position:
    """The position of the newest checkpoint of a workdir or stage."""
    stage = latest_stage(path)
    return read_position(stage / str(steps_of(stage)[-1]))


def load_params(path: str | epath.PathLike) -> tuple[Position, Any]:
    """Position and parameters of the newest checkpoint, whole on the first device, dtypes kept.

    `path` is a workdir or one of its stages. Raises ConfigError if a file is not as it was
    written.
    """
    stage = latest_stage(path)
    position = load_position(stage)
    broken = problems_of(stage / str(position.step), below="params/")
    if broken:
        raise ConfigError(
            f"{broken[0]} Move {stage / str(position.step)} away to use the checkpoint before it; "
            "`ouro checkpoint verify` names all that is broken."
        )
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
        checkpoints.wait()


def _rest(state: TrainState) -> dict[str, Any]:
    return {field: getattr(state, field) for field in ("opt_state", "step", "rng", "guard")}


def _to_json(position: Position) -> dict[str, Any]:
    return dataclasses.asdict(position) | {"model": to_dict(position.model)}


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """What a checkpoint says of itself; ConfigError if it cannot be read."""
    file = folder / META
    try:
        meta = json.loads(file.read_text())
        if meta["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {meta['schema_version']}, expected {SCHEMA_VERSION}")
        return meta
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as a checkpoint's position: {error}") from error


def read_position(folder: epath.Path) -> Position:
    """The position of a checkpoint; ConfigError if it cannot be read."""
    meta = read_meta(folder)
    try:
        names = {f.name for f in dataclasses.fields(Position)}
        fields = {name: meta[name] for name in names} | {
            "model": ModelConfig(**meta["model"]),
            "skip_rows": tuple((start, stop) for start, stop in meta["skip_rows"]),
        }
        return Position(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / META}: not readable as a checkpoint's position: {error}"
        ) from error


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
