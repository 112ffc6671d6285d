"""Prepared data: rows of fixed length in ArrayRecord shards, beside a manifest.

A record is a row: L token ids, then (chat data only) L loss mask bits, then the lengths of the
row's documents as uint32; what they leave of the row is padding. Ids are little-endian uint16,
uint32 if the vocabulary needs it. `manifest.json` says all that is needed to read and to check
the shards; it is written last, so a folder is complete when it is there.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ouro_jax.data.bad_rows import UnreadableRow
from ouro_jax.data.folder import Folder
from ouro_jax.data.workers import Advance, run_pieces
from ouro_jax.errors import ConfigError, RunError

T = TypeVar("T")
FORMAT = "ouro_jax rows 2"
MANIFEST = "manifest.json"
# An open shard costs a file descriptor and 8 bytes a row; 6T tokens at 4,096 are 90,000 shards.
# Opening one takes 0.6 ms, against 150 ms that a host of four v5p chips takes for a row.
OPEN_SHARDS = 512


class Row(NamedTuple):
    """One packed row: `tokens` [L], `segment_lengths` [documents], their sum at most L.

    `loss_mask` [L] marks the tokens that the model is to learn to produce; None means all.
    """

    tokens: np.ndarray
    segment_lengths: np.ndarray
    loss_mask: np.ndarray | None = None


@dataclass
class DocumentCounts:
    """Counted while rows are made.

    `documents` that went into rows and the bytes of their text (UTF-8); of conversations, those
    `truncated` at the end of a row and those `dropped` because nothing was left to learn.
    """

    documents: int = 0
    text_bytes: int = 0
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the folder, rows, size and checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of rows holds. `tokens` does not count padding.

    `documents` to `dropped` are as in DocumentCounts; `skipped` counts unreadable records that
    were allowed; `inputs` is a hash of the settings and of the names and sizes of the input files.
    """

    source: str
    sequence_length: int
    vocab_size: int
    tokenizer_hash: str
    dtype: str
    has_loss_mask: bool
    documents: int
    text_bytes: int
    truncated: int
    dropped: int
    skipped: int
    tokens: int
    rows: int
    inputs: str
    shards: tuple[Shard, ...]

    @property
    def padding_share(self) -> float:
        """The share of token places that hold no token."""
        return 1 - self.tokens / (self.rows * self.sequence_length)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def encode_row(row: Row, dtype: np.dtype) -> bytes:
    """The record of `row`."""
    mask = b"" if row.loss_mask is None else np.packbits(row.loss_mask).tobytes()
    return row.tokens.astype(dtype).tobytes() + mask + row.segment_lengths.astype("<u4").tobytes()


def decode_row(record: bytes, manifest: Manifest) -> Row:
    """The row of `record`; arrays are read-only views where they can be.

    ValueError if it does not fit the manifest: by its size, by a token id beyond the vocabulary,
    or by documents that are longer than the row.
    """
    length = manifest.sequence_length
    tokens = np.frombuffer(record, token_dtype(manifest.vocab_size), length)
    offset = tokens.nbytes
    mask = None
    if manifest.has_loss_mask:
        bits = np.frombuffer(record, np.uint8, -(-length // 8), offset)
        offset += bits.nbytes
        mask = np.unpackbits(bits, count=length).astype(bool)
    row = Row(tokens, np.frombuffer(record, "<u4", offset=offset), mask)
    used, highest = int(row.segment_lengths.sum()), int(tokens.max())
    if used > length or highest >= manifest.vocab_size:
        raise ValueError(
            f"{used} tokens in a row of {length}, highest id {highest} of a vocabulary of "
            f"{manifest.vocab_size}"
        )
    return row


def padding_row(sequence_length: int) -> Row:
    """A row without documents: no token of it is scored or trained on."""
    return Row(np.zeros(sequence_length, np.uint16), np.zeros(0, np.uint32))


def write_shard(
    folder: Folder, name: str, rows: Iterable[Row], sequence_length: int, vocab_size: int
) -> tuple[Shard | None, int]:
    """Writes `rows` as the shard `name`, whole or not at all; returns it and its token count.

    Without rows there is no shard. Raises ConfigError for a token id beyond the vocabulary and
    RunError if the disk does not take the shard.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return None, 0
    dtype, count, tokens = token_dtype(vocab_size), 0, 0
    with folder.writing(name) as path:
        try:
            # group_size 1: each row can be read alone, which random access needs.
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for row in itertools.chain([first], rows):
                _check_row(row, f"{folder.path(name)}, row {count}", sequence_length, vocab_size)
                writer.write(encode_row(row, dtype))
                count += 1
                tokens += int(row.segment_lengths.sum())
            writer.close()
        except RuntimeError as error:  # what array_record raises, when the disk is full and so on
            raise RunError(f"{folder.path(name)}: cannot be written: {error}.") from error
        return Shard(name, count, path.stat().st_size, file_sha256(path)), tokens


def _check_row(row: Row, place: str, length: int, vocab_size: int) -> None:
    if row.tokens.shape != (length,):
        raise ValueError(f"{place}: shape {row.tokens.shape}, expected ({length},)")
    highest = int(row.tokens.max())
    if highest >= vocab_size:
        raise ConfigError(
            f"{place}: token id {highest} is beyond the vocabulary of {vocab_size} entries."
        )


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Writes `manifest.json`: from now on the folder is complete."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
    folder.write_text(MANIFEST, text + "\n")


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a local file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowSource:
    """Random access to the rows of a folder; a source for `grain.MapDataset.source`.

    Of a folder's shards only the `OPEN_SHARDS` last read stay open.
    """

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._ends = list(itertools.accumulate(shard.rows for shard in manifest.shards))
        self._reader = functools.lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Row:
        """Row `index`; UnreadableRow names shard and record if it cannot be read or is not ours."""
        number = bisect.bisect_right(self._ends, index)
        if index < 0 or number == len(self._ends):
            raise IndexError(f"{self.folder}: row {index} of {len(self):,}")
        shard = self.manifest.shards[number]
        record = index - self._ends[number] + shard.rows
        try:
            (content,) = self._reader(number).read([record])
            return decode_row(content, self.manifest)
        except (RuntimeError, ValueError) as error:
            path = self.folder.path(shard.name)
            raise UnreadableRow(self.folder.parent_name, path, record, str(error)) from error

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def _open(self, number: int) -> ArrayRecordReader:
        path = self.folder.path(self.manifest.shards[number].name)
        # For single records from anywhere: no reading ahead, no threads.
        return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of a folder of rows; ConfigError if there is none or it is not ours."""
    folder = Folder(directory)
    path = folder.path(MANIFEST)
    if not folder.has(MANIFEST):
        if not folder.sizes() and not folder.folders():
            raise ConfigError(f"{folder}: no such folder of prepared rows.")
        raise ConfigError(
            f"{folder}: no {MANIFEST}: these are not rows, or their preparation is unfinished. "
            "Repeat its `ouro data prepare` command to go on."
        )
    content = folder.read_bytes(MANIFEST)
    try:
        fields = json.loads(content)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f'"format" is not {FORMAT!r}')
        shards = tuple(_typed(Shard(**shard)) for shard in fields.pop("shards"))
        manifest = _typed(Manifest(shards=shards, **fields))
        if min(manifest.rows, manifest.tokens, manifest.sequence_length) < 1:
            raise ValueError("rows, tokens and sequence_length are at least 1")
        if manifest.dtype != token_dtype(manifest.vocab_size).name:
            raise ValueError(f"dtype {manifest.dtype!r} with {manifest.vocab_size} entries")
        return manifest
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a readable manifest of prepared rows ({error}). "
            "Prepare the data again with `ouro data prepare`."
        ) from error


def _typed(record: T) -> T:
    """`record`, a dataclass read from JSON; ValueError if a field is of another type."""
    for field in dataclasses.fields(record):  # type: ignore[reportArgumentType]
        value = getattr(record, field.name)
        if isinstance(field.type, type) and type(value) is not field.type:
            raise ValueError(f"{field.name} = {value!r}, expected {field.type.__name__}")
    return record


def open_rows(directory: str | os.PathLike) -> RowSource:
    """Opens a folder of rows.

    Raises ConfigError if the folder, its manifest or a shard is missing or cut short; contents
    are checked by `verify_rows` only.
    """
    folder, manifest = Folder(directory), read_manifest(directory)
    rows = sum(shard.rows for shard in manifest.shards)
    if rows != manifest.rows:
        raise ConfigError(
            f"{folder.path(MANIFEST)}: its shards hold {rows:,} rows, not {manifest.rows:,}."
        )
    sizes = folder.sizes()  # one listing: tens of thousands of shards may lie there
    for shard in manifest.shards:
        path = folder.path(shard.name)
        if shard.name not in sizes:
            raise ConfigError(f"{path}: this shard of the manifest is missing.")
        if sizes[shard.name] != shard.bytes:
            raise ConfigError(
                f"{path}: {sizes[shard.name]:,} bytes, the manifest says {shard.bytes:,}. "
                "The shard was cut short or changed; copy or prepare it again."
            )
    return RowSource(folder, manifest)


def verify_rows(
    directory: str | os.PathLike, workers: int = 1, advance: Advance = lambda *_: None
) -> Manifest:
    """Reads everything: checksums, lengths, token ids, counts. ConfigError names the shard.

    `advance` hears of the bytes and tokens of every shard that is right.
    """
    manifest = open_rows(directory).manifest
    work = functools.partial(_verify_shard, directory, manifest)
    tokens = sum(tokens for _, tokens in run_pieces(work, range(len(manifest.shards)), workers,
                                                    advance))  # fmt: skip
    if tokens != manifest.tokens:
        raise ConfigError(f"{directory}: {tokens:,} tokens, the manifest says {manifest.tokens:,}.")
    return manifest


def _verify_shard(
    directory: str | os.PathLike, manifest: Manifest, number: int, advance: Advance
) -> int:
    """Reads a shard: checksum, row count, lengths, token ids. Returns its tokens."""
    folder, shard = Folder(directory), manifest.shards[number]
    path = folder.path(shard.name)
    # Record by record from object storage would take a request for each.
    with folder.reading(shard.name) as local:
        if file_sha256(local) != shard.sha256:
            raise ConfigError(f"{path}: the checksum differs from the manifest's.")
        reader, tokens = ArrayRecordReader(str(local)), 0
        if reader.num_records() != shard.rows:
            raise ConfigError(
                f"{path}: {reader.num_records():,} rows, the manifest says {shard.rows:,}."
            )
        for index in range(shard.rows):
            try:
                row = decode_row(reader.read(), manifest)
            except ValueError as error:
                raise ConfigError(
                    f"{path}, record {index} does not fit the manifest: {error}."
                ) from error
            tokens += int(row.segment_lengths.sum())
        reader.close()
    advance(shard.bytes, tokens)
    return tokens
