"""A folder of prepared data, on a disk or in object storage (gs:// and the like, by fsspec).

Files appear whole or not at all: written aside and renamed on a disk, uploaded in one piece to
object storage.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ouro_jax.data.files import file_system, refusals
from ouro_jax.errors import ConfigError

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
        sizes = {name: size for name, kind, size in self._entries(inside) if kind == "file"}
        return dict(sorted(sizes.items()))

    def folders(self) -> list[str]:
        """The names of the folders in the folder, sorted."""
        return sorted(name for name, kind, _ in self._entries() if kind == "directory")

    def _entries(self, inside: str = "") -> list[tuple[str, str, int]]:
        """Name, type and bytes of all that is in the folder, or in one inside."""
        try:
            entries = self._ask("ls", inside, detail=True)
        except FileNotFoundError:
            return []
        root = self._at(inside)
        paths = ((*entry["name"].rpartition("/"), entry) for entry in entries)
        return [(name, e["type"], e["size"]) for folder, _, name, e in paths if folder == root]

    def read_texts(self, inside: str) -> dict[str, str]:
        """The text of every file in a folder inside, by name; object storage reads them at once."""
        paths = {self._at(f"{inside}/{name}"): name for name in self.sizes(inside)}
        if not paths:
            return {}
        with refusals(self.path(inside)):
            contents = self._fs.cat(list(paths))
        return {paths[path]: content.decode("utf-8") for path, content in contents.items()}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        try:
            return self._ask("info", name)["type"] == "file"
        except FileNotFoundError:
            return False

    def size(self, name: str) -> int:
        """Bytes of a file; -1 if there is none."""
        try:
            return self._ask("info", name)["size"]
        except FileNotFoundError:
            return -1

    def modified(self, name: str) -> float:
        """When a file was written, in Unix seconds."""
        return self._ask("modified", name).timestamp()

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._ask("cat_file", name)

    def read_text(self, name: str) -> str:
        """The text of a file (UTF-8)."""
        return self.read_bytes(name).decode("utf-8")

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """The file itself if it is on a disk, else a copy there for as long as the block takes."""
        if self.is_local:
            yield Path(self._at(name))
            return
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / Path(name).name
            self._ask("get_file", name, lpath=str(copy))
            yield copy

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole."""
        with self.writing(name) as temporary:
            # Half of a character pair, as names and keys of the input may hold, is spelt out.
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local file to write that becomes `name` if the block ends without an exception.

        RunError if the disk or the storage refuses it.
        """
        with refusals(self.path(name), writing=True):
            if self.is_local:
                with self._aside(Path(self._at(name))) as temporary:
                    yield temporary
                return
            with tempfile.TemporaryDirectory() as directory:
                temporary = Path(directory) / Path(name).name
                yield temporary
                self._fs.put_file(str(temporary), self._at(name))

    @contextlib.contextmanager
    def _aside(self, path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Process numbers repeat: containers that share a disk may all be number 7.
        writer = f"{socket.gethostname()}-{os.getpid()}"
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{writer}")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_temporaries(self) -> None:
        """Removes what a killed writer left aside; only while no other one can be at work."""
        for inside in ("", *(self.folders() if self.is_local else ())):
            for name in self.sizes(inside):
                if name.startswith(TEMPORARY):
                    self.remove(f"{inside}/{name}" if inside else name)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder in it, or the whole folder, if it is there."""
        if self._ask("exists", name):
            self._ask("rm", name, recursive=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time, on a disk; made first if it is not there.

        Raises ConfigError if another process has it. Object storage has no locks; there, two
        equal writers write equal files.
        """
        if not self.is_local:
            self.write_text(TEMPORARY, "")  # is refused now, not after the first hour
            self.remove(TEMPORARY)
            yield
            return
        with refusals(self._path, writing=True):
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

    def _ask(self, question: str, name: str, **options: Any) -> Any:
        """What a method of the file system says to a path; refusals are ConfigErrors."""
        with refusals(self.path(name) if name else self._path):
            return getattr(self._fs, question)(self._at(name), **options)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def rename_unless_there(temporary: Path, final: Path) -> None:
    """Renames a folder that was built aside; if another process was faster, it is removed."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary)  # the other one's rows are the same
