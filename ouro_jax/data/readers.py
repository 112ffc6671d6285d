"""The records of one file, or of a piece of it, one by one: JSONL, text, Parquet, Arrow.

A reader yields records as they lie in the file and takes them apart on demand: so one that is of
no use can be named and left out, and the next one be read.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

from ouro_jax.data.files import open_file
from ouro_jax.errors import ConfigError, nearest

BLOCK = 1 << 20  # bytes of a read; lines are cut out of blocks
COMPRESSED_BLOCK = 1 << 17  # what is decompressed at once, and lost where it is damaged
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
ARROW_BATCH = 256  # rows taken apart at once: 256 documents of 100 KB are 26 MB
# What `zstd --long=31` needs to be read, the most there is; other files use less.
ZSTD_WINDOW = 1 << 31


@dataclass(frozen=True)
class Span:
    """A piece of a file that can be read alone.

    Of a plain JSONL file the bytes from `start` to `stop` (the lines that begin there), of
    Parquet the row groups from `start` to `stop`; (0, 0) is a whole file. `size` is its weight:
    bytes, times an estimate of what they grow to where they are compressed.
    """

    path: str
    start: int
    stop: int
    size: int


class Fields(NamedTuple):
    """The fields of a record that are read: those it must have, may have, or all there are."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    others: bool = False


class NotUtf8(ConfigError):
    """Bytes that are no text, `line` lines below the first line of their record."""

    def __init__(self, error: UnicodeDecodeError):
        super().__init__(f"not UTF-8 ({error.reason}). Convert the file to UTF-8.")
        self.line = error.object.count(b"\n", 0, error.start)


class BrokenFile(Exception):
    """A file cannot be read on from here; the message is what its library says."""


class Reader(Protocol):
    """What the readers have in common. `first` is the number of the first record.

    Iterating raises BrokenFile where a file is cut off or damaged, and ConfigError if it is not
    what it should be.
    """

    first: int

    def __init__(self, span: Span, fields: Fields): ...

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Numbers and records."""
        ...

    def parse(self, raw: Any) -> Any:
        """A record taken apart; ConfigError, without the place, if that fails."""
        ...

    def place(self, number: int) -> str:
        """Where a record lies, in words."""
        ...


class JsonLines:
    """A JSON value in every line; empty lines are skipped."""

    first = 1

    def __init__(self, span: Span, fields: Fields):
        self._span = span
        self._lines_before: int | None = None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        span, position = self._span, 0
        with open_text(span.path) as file:
            if span.start:
                # A line that begins at `start` comes after the newline before it.
                file.seek(span.start - 1)
                position = span.start - 1 + len(file.readline())
            for number, line in enumerate(file, self.first):
                if span.stop and position >= span.stop:
                    return
                position += len(line)
                if not line.isspace():
                    yield number, line

    def parse(self, raw: bytes) -> Any:
        """The value of a line."""
        line = _decode(raw)
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"broken JSON ({error.msg}, column {error.colno}).") from error
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond limits
            raise ConfigError(f"broken JSON ({error}).") from error

    def place(self, number: int) -> str:
        """File and line, counted in the whole file, whose beginning is read once for it."""
        if self._lines_before is None:
            self._lines_before = _lines_before(self._span)
        return f"{self._span.path}, line {self._lines_before + number}"


def _lines_before(span: Span) -> int:
    """Lines of the file that are not the span's: they begin before its start."""
    if not span.start:
        return 0
    left, newlines = span.start - 1, 1  # the newline that ends the line of the last byte before
    with open_file(span.path) as file:
        while left:
            block = file.read(min(BLOCK, left))
            newlines += block.count(b"\n")
            left -= len(block)
    return newlines


class TextFile:
    """A file that is one document."""

    first = 1

    def __init__(self, span: Span, fields: Fields):
        self._path, self._fields = span.path, fields

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with open_text(self._path) as file:
            yield self.first, file.read()

    def parse(self, raw: bytes) -> dict[str, str]:
        """The text, as the field that holds it."""
        return {self._fields.required[0]: _decode(raw)}

    def place(self, number: int) -> str:
        """File and line."""
        return f"{self._path}, line {number}"


class ArrowRows:
    """Rows of an Arrow stream, as Hugging Face `datasets` writes them; the first is row 0."""

    first = 0

    def __init__(self, span: Span, fields: Fields):
        self._span, self._fields = span, fields
        self._columns: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        error_type = library("pyarrow", self._span.path).ArrowException
        with open_file(self._span.path) as raw:
            try:
                batches = self._batches(raw)
                number = self.first
                for batch in batches:
                    for row in zip(*(batch.column(name) for name in self._columns), strict=True):
                        yield number, row
                        number += 1
            except (error_type, OSError) as error:
                raise BrokenFile(str(error)) from error

    def _batches(self, raw: BinaryIO) -> Iterator[Any]:
        pyarrow = library("pyarrow", self._span.path)
        try:
            stream = pyarrow.ipc.open_stream(raw)
        except pyarrow.ArrowException as error:
            raise ConfigError(f"{self._span.path}: no Arrow stream ({error}).") from error
        self._columns = _columns(self._span.path, stream.schema.names, self._fields)
        yield from stream
        # Cut off between two batches, a stream ends without a word.
        raw.seek(-len(END_OF_STREAM), os.SEEK_END)
        if raw.read() != END_OF_STREAM:
            raise BrokenFile("the end-of-stream mark is missing")

    def parse(self, raw: tuple[Any, ...]) -> dict[str, Any]:
        """The values of a row by column."""
        try:
            return {name: value.as_py() for name, value in zip(self._columns, raw, strict=True)}
        except UnicodeDecodeError as error:
            raise ConfigError(f"not UTF-8 ({error.reason}).") from error
        except (ValueError, OverflowError) as error:  # times that Python has none of
            raise ConfigError(f"a value cannot be read ({error}).") from error

    def place(self, number: int) -> str:
        """File and row."""
        return f"{self._span.path}, row {number}"


class ParquetRows(ArrowRows):
    """Rows of the row groups of a Parquet file; row numbers are those of the whole file."""

    def _batches(self, raw: BinaryIO) -> Iterator[Any]:
        span = self._span
        file = _open_parquet(raw, span.path)
        groups = range(span.start, span.stop or file.num_row_groups)
        # One by one: a batch over two groups would be lost whole where the second is damaged.
        batches = (
            file.iter_batches(ARROW_BATCH, row_groups=[group], columns=self._columns)
            for group in groups
        )
        self.first = sum(file.metadata.row_group(index).num_rows for index in range(span.start))
        self._columns = _columns(span.path, file.schema_arrow.names, self._fields)
        return itertools.chain.from_iterable(batches)


def row_group_sizes(path: str, fields: Fields) -> list[int]:
    """Bytes of every row group of a Parquet file; ConfigError if it lacks a field of `fields`."""
    with open_file(path) as raw:
        file = _open_parquet(raw, path)
        _columns(path, file.schema_arrow.names, fields)
        groups = range(file.num_row_groups)
        return [file.metadata.row_group(index).total_byte_size for index in groups]


def _open_parquet(raw: BinaryIO, path: str) -> Any:
    error_type = library("pyarrow", path).ArrowException
    try:
        return library("pyarrow.parquet", path).ParquetFile(raw)
    except (error_type, OSError) as error:
        raise ConfigError(f"{path}: no Parquet file, or cut off ({error}).") from error


def _columns(path: str, names: Sequence[str], fields: Fields) -> list[str]:
    for name in fields.required:
        if name not in names:
            raise ConfigError(
                f"{path}: no column {name!r}; there are {', '.join(names)}.{nearest(name, names)}"
            )
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: there are {names.count(name)} columns {name!r}.")
    if fields.others:
        return list(names)
    return [*fields.required, *(name for name in fields.optional if name in names)]


def library(name: str, path: str) -> Any:
    """A module of the extra `data`; ConfigError saying so if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"{path}: reading it takes {package}. Run pip install 'ouro_jax[data]'."
        ) from error


@contextlib.contextmanager
def open_text(path: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file for the block, decompressed if it is called `.gz` or `.zst`.

    Reading raises BrokenFile where compressed data is cut off or damaged.
    """
    with open_file(path) as file:
        if path.endswith(".gz"):
            file = _Decompressed(file, lambda: zlib.decompressobj(wbits=31), zlib.error)
        elif path.endswith(".zst"):
            zstandard = library("zstandard", path)
            decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
            file = _Decompressed(file, decompressor.decompressobj, zstandard.ZstdError)
        yield io.BufferedReader(file, BLOCK)  # type: ignore[reportArgumentType]


class _Decompressed(io.RawIOBase):
    """What a file of one or more compressed members holds.

    Instead of the libraries' own file objects: zstandard's takes a file that was cut off for one
    that ends there, and gzip's loses up to a block before the end.
    """

    def __init__(self, file: BinaryIO, new_member: Callable[[], Any], error: type[Exception]):
        self._file, self._new_member, self._error = file, new_member, error
        self._member = new_member()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._decompress():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> bool:
        """Makes more data ready, perhaps none yet; False at the end of the last member."""
        if not self._member.eof:
            data = self._file.read(COMPRESSED_BLOCK)
            if not data:
                raise BrokenFile("the compressed data ends too soon")
        else:
            # Zeros after a member are padding, as tape and tar leave it.
            data = self._member.unused_data.lstrip(b"\0")
            while not data:
                block = self._file.read(COMPRESSED_BLOCK)
                if not block:
                    return False
                data = block.lstrip(b"\0")
            self._member = self._new_member()
        try:
            self._ready = memoryview(self._member.decompress(data))
        except self._error as error:
            raise BrokenFile(str(error)) from error
        return True


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(error) from error
