"""Input files, local and remote alike: a path may have any scheme that fsspec knows (`gs://`)."""

import contextlib
import glob
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ouro_jax.config import ConfigError, RunError, require

# When a file was written, as gs://, s3:// and memory:// call it.
_MODIFIED = ("mtime", "LastModified", "created")


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
        return fsspec.core.url_to_fs(path)
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
    if system.isfile(path):
        found = {path: system.info(path)}
    elif system.isdir(path):
        found = system.find(path, detail=True)
    else:
        found = system.glob(path, detail=True)
    return [
        File(system.unstrip_protocol(name), info["size"], _modified(info))
        for name, info in found.items()
        if info["type"] == "file"
    ]


def _modified(info: Mapping[str, Any]) -> float:
    """Unix seconds; 0 where the file system does not say it."""
    time: Any = next((info[key] for key in _MODIFIED if key in info), 0.0)
    return time if isinstance(time, float) else time.timestamp()


@contextlib.contextmanager
def open_file(path: str, mode: str = "rb") -> Iterator[BinaryIO]:
    """Opens a file in a binary mode for the block.

    What the system refuses is a ConfigError when reading and a RunError when writing.
    """
    system, bare = file_system(path)
    try:
        with system.open(bare, mode) as file:
            yield file
    except OSError as error:
        reason = error.strerror or error
        if "r" in mode:
            raise ConfigError(f"{path}: cannot be read ({reason}).") from error
        raise RunError(f"{path}: cannot be written ({reason}).") from error
