"""A folder of prepared data, on a disk or in object storage (gs:// and the like, by fsspec).

Files appear whole or not at all: written aside and renamed on a disk, uploaded in one piece to
object storage.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from ouro_jax.config import ConfigError, RunError
from ouro_jax.data.files import file_system

TEMPORARY = ".unfinished-"


class Folder:
    """The folder at `path`, which need not exist; str() gives the path as it was written."""

    def __init__(self, path: str | os.PathLike):
        self._fs, root = file_system(os.fspath(path))
        self._root = str(root).rstrip("/")
        self._path = os.fspath(path).rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __str__(self) -> str:
        return self._path

    def path(self, name: str) -> str:
        """The path of a file in the folder, as other libraries take it."""
        return f"{self._path}/{name}"

    @property
    def parent_name(self) -> str:
        """The name of the folder that this one is in."""
        return self._root.split("/")[-2]

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Bytes of every file in the folder (or a folder `inside`), by name; empty if none is."""
        root = self._at(inside)
        if not self._fs.isdir(root):
            return {}
        entries = self._fs.ls(root, detail=True)
        files = {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}
        return dict(sorted(files.items()))

    def read_texts(self, inside: str) -> dict[str, str]:
        """The text of every file in a folder inside, by name; object storage reads them at once."""
        paths = {self._at(f"{inside}/{name}"): name for name in self.sizes(inside)}
        if not paths:
            return {}
        contents = self._fs.cat(list(paths))
        return {paths[path]: content.decode("utf-8") for path, content in contents.items()}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self._fs.isfile(self._at(name))

    def modified(self, name: str) -> float:
        """When a file was written, in Unix seconds."""
        return self._fs.modified(self._at(name)).timestamp()

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._fs.cat_file(self._at(name))

    def read_text(self, name: str) -> str:
        """The text of a file (UTF-8)."""
        return self.read_bytes(name).decode("utf-8")

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file, in hexadecimal digits."""
        with self._fs.open(self._at(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole."""
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local file to write that becomes `name` if the block ends without an exception.

        RunError if the disk or the storage refuses it.
        """
        try:
            if self.is_local:
                with self._aside(Path(self._at(name))) as temporary:
                    yield temporary
            else:
                with tempfile.TemporaryDirectory() as directory:
                    temporary = Path(directory) / Path(name).name
                    yield temporary
                    self._fs.put_file(str(temporary), self._at(name))
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.path(name)}: cannot be written ({reason}).") from error

    @contextlib.contextmanager
    def _aside(self, path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_temporaries(self) -> None:
        """Removes what a killed writer left aside; only while no other one can be at work."""
        for inside in ("", *(self._folders_inside() if self.is_local else ())):
            for name in self.sizes(inside):
                if name.startswith(TEMPORARY):
                    self.remove(f"{inside}/{name}" if inside else name)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder in it, or the whole folder, if it is there."""
        if self._fs.exists(self._at(name)):
            self._fs.rm(self._at(name), recursive=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time, on a disk; made first if it is not there.

        Raises ConfigError if another process has it. Object storage has no locks; there, two
        equal writers write equal files.
        """
        if not self.is_local:
            yield
            return
        os.makedirs(self._root, exist_ok=True)
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                f"{self}: another process is writing there. Wait for it, or choose another folder."
            ) from error
        try:
            yield
        finally:
            os.close(descriptor)

    def _folders_inside(self) -> list[str]:
        entries = self._fs.ls(self._root, detail=True)
        return [e["name"].rpartition("/")[2] for e in entries if e["type"] == "directory"]

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root
