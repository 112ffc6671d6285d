"""Files of JSON lines: a kill tears at most the last line, and a full disk loses none.

One JSON object with a field `kind` a line, written at once. A line counts as written when its
newline is there.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ouro_jax.errors import ConfigError, RunError


class Lines:
    """A file open for more lines, less a last line torn by a kill.

    What the disk does not take now (it is full, say) is kept and tried again with the next line:
    training goes on meanwhile. RunError on closing if it never took it.
    """

    def __init__(self, path: Path):
        self._path = path
        if path.exists():
            kept = _whole_lines(path)
            if len(kept) < path.stat().st_size:
                replace_file(path, kept)
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""
        self._failure: OSError | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, or keeps it for the next time; NaN and infinities become null."""
        self._pending += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Closes the file; RunError if lines were never written."""
        if self._pending:
            self._write()
        self._file.close()
        if self._failure is not None:
            lost = self._pending.count(b"\n")
            raise RunError(f"{self._path}: its last {lost} lines are lost: {self._failure}.")

    def _write(self) -> None:
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
