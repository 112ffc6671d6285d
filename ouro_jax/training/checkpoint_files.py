"""The files of checkpoints: checksums, what lies there, what is set aside and what may go.

`STAGE/STEP/SHA256SUMS` lists every file of a checkpoint, as `sha256sum -c` reads it. It is written
last: a checkpoint without it was not finished, and is not used.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec.config
from etils import epath

from ouro_jax.config import STAGE_ORDER
from ouro_jax.data.files import file_system
from ouro_jax.errors import ConfigError

SUMS = "SHA256SUMS"
META = "meta/metadata"
SET_ASIDE = "set_aside"
HASH_THREADS = 4
CHUNK_BYTES = 16 * 2**20
# In a bucket TensorStore and other processes write too: epath must not remember what lies there.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint as it lies there; `bytes` and `position` are 0 and {} where unreadable."""

    stage: str
    step: int
    path: epath.Path
    is_finished: bool
    bytes: int
    saved_at: float
    meta: dict[str, Any]

    @property
    def is_permanent(self) -> bool:
        """Whether no policy deletes it; one that cannot be read is left alone."""
        return bool(self.meta.get("permanent", True))


def absolute(path: str | epath.PathLike) -> epath.Path:
    """A path as Orbax wants it: whole, unless it is in a bucket."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def checkpoint_root(workdir: str | epath.PathLike) -> epath.Path:
    """Where the checkpoints of the run in `workdir` lie: there, or as its config says."""
    workdir = absolute(workdir)
    saved = workdir / "config.json"
    if not saved.exists():
        return workdir
    try:
        elsewhere = json.loads(saved.read_text()).get("checkpoint", {}).get("directory")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{saved}: not readable as a config: {error}") from error
    return absolute(elsewhere) if elsewhere else workdir


def steps_of(stage: epath.Path) -> list[int]:
    """Steps of the finished checkpoints in a stage's folder, rising; none without a folder."""
    return [step for step in all_steps(stage) if (stage / str(step) / SUMS).exists()]


def all_steps(stage: epath.Path) -> list[int]:
    """Steps of the checkpoints in a stage's folder, unfinished ones too, rising."""
    if not stage.is_dir():
        return []
    return sorted(int(entry.name) for entry in stage.iterdir() if entry.name.isdigit())


def list_checkpoints(root: epath.Path) -> list[CheckpointFile]:
    """Every checkpoint of a run, in the order of training; reads no arrays."""
    return [checkpoint for stage in STAGE_ORDER for checkpoint in list_stage(root / stage)]


def list_stage(stage: epath.Path) -> list[CheckpointFile]:
    """The checkpoints in a stage's folder."""
    found = []
    for step in all_steps(stage):
        with contextlib.suppress(FileNotFoundError):  # one that is being deleted
            found.append(_describe(stage / str(step), stage.name, step))
    return found


def list_set_aside(root: epath.Path) -> list[CheckpointFile]:
    """What `set_aside` has moved away from the run at `root`."""
    return [
        _describe(path, stage, int(path.name.partition("_")[0]))
        for stage in STAGE_ORDER if (root / SET_ASIDE / stage).is_dir()
        for path in sorted((root / SET_ASIDE / stage).iterdir())
    ]  # fmt: skip


def checkpoints_at(path: epath.Path) -> list[CheckpointFile]:
    """The checkpoints of a workdir, those of a stage's folder, or the one whose folder it is.

    Raises ConfigError if there is none.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a workdir of `ouro train`.")
    if found := list_checkpoints(checkpoint_root(path)) or list_stage(path):
        return found
    if path.name.isdigit() and not (path / "config.json").exists():
        return [_describe(path, path.parent.name, int(path.name))]
    raise ConfigError(f"{checkpoint_root(path)}: no checkpoint here.")


def _describe(path: epath.Path, stage: str, step: int) -> CheckpointFile:
    stats = [file.stat() for file in _files(path)]
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError):
        meta = {}
    newest = max((stat.mtime for stat in stats), default=0)
    total = sum(stat.length for stat in stats)
    return CheckpointFile(
        stage, step, path, (path / SUMS).exists(), total, newest,
        meta if isinstance(meta, dict) else {},
    )  # fmt: skip


def write_sums(path: epath.Path) -> None:
    """Finishes a checkpoint that is on disk."""
    files = _files(path)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        sums = list(pool.map(_sha256, files))
    lines = [
        f"{digest}  {file.relative_to(path)}\n" for digest, file in zip(sums, files, strict=True)
    ]
    part = path / f"{SUMS}.part"
    part.write_text("".join(lines))
    part.rename(path / SUMS)


def problems_of(
    path: epath.Path, part: int = 0, parts: int = 1, below: str = "",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:  # fmt: skip
    """What is wrong with the files of a checkpoint; empty if it is as it was written.

    Of `parts` equal parts only one is read, and only files whose names begin with `below`.
    `advance` hears, from several threads, of the bytes that were read.
    """
    try:
        lines = (path / SUMS).read_text().split("\n")[:-1]  # one without its end does not count
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path / SUMS}: cannot be read ({type(error).__name__}); it was not finished."]
    entries = []
    for number, line in enumerate(lines, start=1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            return [f"{path / SUMS}, line {number}: {line[:80]!r} is no checksum of a file."]
        if name.startswith(below):
            entries.append((path / name, digest))
    listed = {file for file, _ in entries}
    problems = [
        f"{file}: {SUMS} does not list it." for file in _files(path)
        if file not in listed and str(file.relative_to(path)).startswith(below)
    ]  # fmt: skip
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found = pool.map(lambda entry: _problem(entry[0], entry[1], advance), entries[part::parts])
        return problems + [problem for problem in found if problem]


def _problem(file: epath.Path, expected: str, advance: Callable[[int], None]) -> str | None:
    try:
        found = _sha256(file, advance)
    except FileNotFoundError:
        return f"{file}: missing, but {SUMS} lists it."
    except (OSError, ValueError) as error:  # a broken name may be no name at all
        return f"{file}: cannot be read: {error}."
    if found != expected:
        return f"{file}: its SHA-256 is {found[:12]}…, {SUMS} says {expected[:12]}…"
    return None


def set_aside(path: epath.Path) -> epath.Path:
    """Moves a broken checkpoint to ROOT/set_aside/STAGE/STEP, and returns where it is now."""
    stage = path.parent
    folder = stage.parent / SET_ASIDE / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    number = 1
    while target.exists():
        number += 1
        target = folder / f"{path.name}_{number}"
    if "://" in str(path):  # a bucket has no folders, neither to rename nor to rename into
        file_system(str(path))[0].mv(str(path), str(target), recursive=True)
    else:
        path.rename(target)
    return target


def prunable(checkpoints: Sequence[CheckpointFile], keep: int) -> list[CheckpointFile]:
    """The temporary checkpoints that a policy lets go: of each stage all but the newest `keep`.

    Those that are not finished do not count and are left alone.
    """
    if keep < 1:
        raise ConfigError(f"--keep={keep}: expected at least 1.")
    gone = []
    for stage in {checkpoint.stage for checkpoint in checkpoints}:
        temporary = [
            checkpoint for checkpoint in checkpoints
            if checkpoint.stage == stage and checkpoint.is_finished and not checkpoint.is_permanent
        ]  # fmt: skip
        gone += sorted(temporary, key=lambda checkpoint: checkpoint.step)[:-keep]
    return gone


def delete(checkpoints: Iterable[CheckpointFile]) -> None:
    """Deletes checkpoints; first what makes them whole, so that none is left half deleted."""
    for checkpoint in checkpoints:
        (checkpoint.path / SUMS).unlink(missing_ok=True)
        checkpoint.path.rmtree()


def delete_unfinished(stage: epath.Path, steps: Iterable[int]) -> None:
    """Deletes what failed saves have left, also where Orbax had not yet named it `STEP`."""
    names = {str(step) for step in steps}
    for path in stage.iterdir():
        if path.name.partition(".")[0] in names and not (path / SUMS).exists():
            path.rmtree()


def _files(path: epath.Path) -> list[epath.Path]:
    found = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            found += _files(entry)
        elif entry.name not in (SUMS, f"{SUMS}.part"):
            found.append(entry)
    return found


def _sha256(file: epath.Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
