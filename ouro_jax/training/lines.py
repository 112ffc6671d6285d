"""Files that survive a full disk, and files of JSON lines, of which a kill tears the last at most.

One JSON object with a field `kind` a line, written at once. A line counts as written when its
newline is there.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ouro_jax.errors import ConfigError, RunError


class GrowingFile:
    """A file that is only appended to.

    What the disk does not take now (it is full, say) is kept and tried again with what comes next:
    training goes on meanwhile. RunError on closing if it never took it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""
        self._failure: OSError | None = None

    def write(self, content: bytes) -> None:
        """Writes `content` at once, or keeps it for the next time."""
        self._pending += content
        try:
            written = 0
            while written < len(self._pending):
                written += self._file.write(self._pending[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            if self._failure is None:
                print(f"{self._path}: cannot be written: {error}; kept for later.", file=sys.stderr)
            self._failure = error
        else:
            self._size += len(self._pending)
            self._pending, self._failure = b"", None

    def close(self) -> None:
        """Closes the file; RunError if something was never written, unless an error is on its way
        already: that one says more."""
        if self._pending:
            self.write(b"")
        self._file.close()
        if self._failure is not None:
            lost = len(self._pending)
            text = f"{self._path}: its last {lost:,} bytes are lost: {self._failure}."
            if sys.exc_info()[1] is None:
                raise RunError(text)
            print(text, file=sys.stderr)


class Lines(GrowingFile):
    """A file open for more lines, less a last line torn by a kill."""

    def __init__(self, path: Path):
        if path.exists():
            kept = _whole_lines(path)
            if len(kept) < path.stat().st_size:
                replace_file(path, kept)
        super().__init__(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, or keeps it for the next time; NaN and infinities become null."""
        self.write(json.dumps(finite(record), allow_nan=False).encode() + b"\n")


class Forgiving:
    """A stream such as sys.stdout whose disk may be full: what it does not take is no error."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, which may be lost."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, as far as the disk takes it."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, less a last line torn by a kill; ConfigError naming a wrong line."""
    records = []
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: not JSON ({error}). Delete that line, or restore the file."
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise ConfigError(
                f"{path}, line {number}: saw {line[:60].decode(errors='replace')!r}, expected a "
                "JSON object with a field 'kind'. Delete that line, or restore the file."
            )
        records.append(record)
    return records


def finite(value: Any) -> Any:
    """A value of JSON with null in the place of NaN and infinities, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_file(path: Path, content: bytes) -> None:
    """Puts `content` in the place of `path`: at every moment the file is the old or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
