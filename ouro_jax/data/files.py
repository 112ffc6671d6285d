"""Input files, local and remote alike: a path may have any scheme that fsspec knows (`gs://`)."""

import contextlib
import glob
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ouro_jax.errors import ConfigError, RunError, require

# When a file was written, as gs://, s3:// and memory:// call it.
_MODIFIED = ("mtime", "LastModified", "created")
# Whose exceptions say that storage refuses or is out of reach; many of them are no OSErrors.
_CLIENTS = {"gcsfs", "google", "aiohttp", "requests", "fsspec"}
for _name in ("gcsfs", "fsspec"):  # they log what they raise, with tracebacks
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class File(NamedTuple):
    """A file: its path with its scheme, bytes, and when it was written (Unix seconds)."""

    path: str
    size: int
    modified: float


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system that `path` is on, and the path as that system writes it.

    Raises ConfigError for an unknown scheme and for one whose package is not installed.
    """
    try:
        # Remembered listings would not show what other processes have written since.
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"{path}: {error}. Run pip install 'ouro_jax[data]'.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from error


def find_files(pattern: str) -> list[File]:
    """The files that `pattern` matches (`**` goes into folders), sorted by path.

    A folder without a wildcard stands for every file in it and below. ConfigError if there is
    no file, or if a link leads nowhere.
    """
    system, path = file_system(pattern)
    files = _local_files(path) if isinstance(system, LocalFileSystem) else _files(system, path)
    require(bool(files), "input", pattern, "a path or a pattern that matches at least one file")
    return sorted(files)


def _local_files(path: str) -> list[File]:
    """By Python's own glob: fsspec's does not see links, which downloaded data often are."""
    if os.path.exists(path):
        path = glob.escape(path) + ("/**" if os.path.isdir(path) else "")
    files = []
    for name in glob.glob(path, recursive=True):
        try:
            status = os.stat(name)
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read ({error.strerror}).") from error
        if not stat.S_ISDIR(status.st_mode):
            files.append(File(name, status.st_size, status.st_mtime))
    return files


def _files(system: Any, path: str) -> list[File]:
    found = {}
    with refusals(system.unstrip_protocol(path)), contextlib.suppress(FileNotFoundError):
        try:
            info = system.info(path)
            found = system.find(path, detail=True) if info["type"] == "directory" else {path: info}
        except FileNotFoundError:
            found = system.glob(path, detail=True)
    return [
        File(system.unstrip_protocol(name), info["size"], _modified(info))
        for name, info in found.items()
        if info["type"] == "file"
    ]


def modified(path: str) -> float:
    """When a file was written, as `find_files` says it; ConfigError if it is gone."""
    system, bare = file_system(path)
    try:
        if isinstance(system, LocalFileSystem):
            return os.stat(path).st_mtime
        with refusals(path):
            return _modified(system.info(bare))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: cannot be read (No such file).") from error


def _modified(info: Mapping[str, Any]) -> float:
    """Unix seconds; 0 where the file system does not say it."""
    time: Any = next((info[key] for key in _MODIFIED if key in info), 0.0)
    return time if isinstance(time, float) else time.timestamp()


@contextlib.contextmanager
def refusals(path: str, writing: bool = False) -> Iterator[None]:
    """Names `path` where a disk or object storage refuses what the block does.

    ConfigError when reading and for a missing bucket or folder, RunError when writing; a missing
    file stays a FileNotFoundError when reading.
    """
    try:
        yield
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        client = type(error).__module__.partition(".")[0]
        if is_missing and not writing or not (isinstance(error, OSError) or client in _CLIENTS):
            raise
        reason = getattr(error, "strerror", None) or error
        if "://" in path:
            name = "no such bucket" if is_missing else f"{type(error).__name__}: {error}"
            reason = f"{' '.join(name.split())}; check the name, the network and your credentials"
        kind = RunError if writing and not is_missing else ConfigError
        verb = "written" if writing else "read"
        raise kind(f"{path}: cannot be {verb} ({reason}).") from error


@contextlib.contextmanager
def open_file(path: str, mode: str = "rb") -> Iterator[BinaryIO]:
    """Opens a file in a binary mode for the block.

    What the system refuses is a ConfigError when reading and a RunError when writing.
    """
    system, bare = file_system(path)
    try:
        with refusals(path, writing="r" not in mode), system.open(bare, mode) as file:
            yield file
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: cannot be read (No such file).") from error
