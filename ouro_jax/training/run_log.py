"""The log of a run: `metrics.jsonl`, mirrored to TensorBoard and, when asked, Weights & Biases.

The JSONL file is the record that everything else is made from; see `lines.py`.
"""

import importlib
import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from ouro_jax.errors import ConfigError
from ouro_jax.training.lines import GrowingFile, Lines, finite, read_lines, replace_file

FILE_NAME = "metrics.jsonl"
# What places or sizes a record and is no curve of its own.
NOT_SCALARS = frozenset({"time", "step", "tokens", "trained_loops", "num_tokens", "num_bytes"})


class RunLog:
    """Writes the records of a run in `workdir`; with `enabled` False (processes 1, …) does
    nothing.

    Continues a log that is there, less a last line torn by a kill. `wandb_project` names the
    Weights & Biases project to mirror to; empty means none.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        enabled: bool = True,
    ):
        self.workdir = Path(workdir)
        self._path = self.workdir / FILE_NAME
        self._enabled, self._tensorboard = enabled, tensorboard
        self._mirrors: list[_Mirror] | None = None
        self._wandb_project = wandb_project
        self._wandb = _import_wandb(wandb_project) if wandb_project and enabled else None
        if enabled:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = Lines(self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record and mirrors its numbers; NaN and infinities are written as null."""
        if not self._enabled:
            return
        record = finite(record)
        if self._mirrors is None:
            # Opened late: they must know from where on an earlier, killed attempt is void.
            self._mirrors = self._open_mirrors()
        self._file.append(record)
        scalars = dict(scalars_of(record))
        for mirror in self._mirrors if scalars else ():
            mirror.write(scalars, record["tokens"])

    def rewind(self, step: int) -> None:
        """Drops, atomically, what was logged after the checkpoint of `step`.

        Called when a run continues from that checkpoint, so that the log of a killed and
        continued run equals that of an uninterrupted one, `resume` events and times aside.
        Records without a step (baselines) stay. The start of a stage that begins at `step` goes
        too: it is about to be logged again.
        """
        if not self._enabled:
            return
        records = self.records()
        kept = [record for record in records if _is_before(record, step)]
        if len(kept) == len(records):
            return
        self.close()
        replace_file(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = Lines(self._path)

    def records(self) -> list[dict[str, Any]]:
        """What the log holds so far; empty for a new run, and where it is not enabled."""
        return read_log(self.workdir) if self._enabled and self._path.exists() else []

    def close(self) -> None:
        """Flushes and closes the file and its mirrors."""
        if self._enabled:
            self._file.close()
            for mirror in self._mirrors or ():
                mirror.close()
            self._mirrors = None

    def _open_mirrors(self) -> "list[_Mirror]":
        tokens = max((record.get("tokens", 0) for record in self.records()), default=0)
        mirrors: list[_Mirror] = []
        if self._tensorboard:
            mirrors.append(_TensorBoard(self.workdir / "tensorboard", tokens))
        if self._wandb is not None:
            mirrors.append(_WandB(self._wandb, self._wandb_project, self.workdir))
        return mirrors


def read_log(workdir: str | Path) -> list[dict[str, Any]]:
    """Every record of a run's `metrics.jsonl`, less a last line torn by a kill.

    Raises ConfigError naming the file if it is missing, and the line if one is not a record.
    """
    path = Path(workdir) / FILE_NAME
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; expected the log of a run. Name the workdir of `ouro train`."
        )
    return read_lines(path)


def scalars_of(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves a record has a point of: `train/loss`, `train/loss_per_loop/1`, ….

    Loops count from 1; held-out names carry the source: `heldout/code/mean_depth`.
    """
    if record["kind"] not in ("train", "heldout"):
        return
    prefix = "/".join(filter(None, (record["kind"], record.get("source"))))
    for name, value in record.items():
        if name not in NOT_SCALARS:
            yield from _leaves(f"{prefix}/{name}", value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for place, inner in enumerate(value, start=1):
            yield from _leaves(f"{name}/{place}", inner)
    elif isinstance(value, int | float):
        yield name, value


class _Mirror(Protocol):
    """Another place that gets the numbers; the x axis is always tokens seen."""

    def write(self, scalars: dict[str, float], tokens: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files. `tokens` is where the log stands: later points of old files are void.

    Written here and not by tensorboardX's own writer: its thread dies of a full disk, and the run
    would then wait for the queue without end.
    """

    def __init__(self, directory: Path, tokens: int):
        directory.mkdir(exist_ok=True)
        # The number keeps a file opened within a second of another from being the same.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        self._file = GrowingFile(directory / name)
        self._append(file_version="brain.Event:2")
        if tokens:
            self._append(step=tokens + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, scalars: dict[str, float], tokens: int) -> None:
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        # An event's step is an int64: 7.7T tokens fit.
        self._append(step=tokens, summary=Summary(value=points))

    def _append(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(event))
        parts = (size, _checksum(size), event, _checksum(event))
        self._file.write(b"".join(parts))

    def close(self) -> None:
        self._file.close()


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))


class _WandB:
    """One Weights & Biases run per workdir, whose id lies in `wandb_id.txt`."""

    def __init__(self, wandb: Any, project: str, workdir: Path):
        id_file = workdir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, name=workdir.resolve().name, dir=str(workdir),
            id=id_file.read_text(), resume="allow",
        )  # fmt: skip
        self._run.define_metric("*", step_metric="tokens")

    def write(self, scalars: dict[str, float], tokens: int) -> None:
        self._run.log({**scalars, "tokens": tokens})

    def close(self) -> None:
        self._run.finish()


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"logging.wandb_project = {project!r}, but the package wandb is not installed: run "
            "`pip install wandb`, or leave the project empty."
        ) from error


def _is_before(record: dict[str, Any], step: int) -> bool:
    at = record.get("step", -1)
    return at < step or (at == step and record.get("event") != "stage_start")
