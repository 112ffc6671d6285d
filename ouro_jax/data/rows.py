"""Prepared data on disk: rows of fixed length in ArrayRecord shards, beside a manifest.

A record is a row: L token ids, then (chat data only) L loss mask bits, then the lengths of the
row's documents as uint32; what they leave of the row is padding. Ids are little-endian uint16,
uint32 if the vocabulary needs it. `manifest.json` says all that is needed to read and to check
the shards. A directory appears complete or not at all: it is written aside and renamed.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ouro_jax.config import ConfigError

FORMAT = "ouro_jax rows 1"
MANIFEST = "manifest.json"
# 2^26 tokens: shards of about 128 MB, small enough to check and to copy one by one.
SHARD_TOKENS = 1 << 26


class Row(NamedTuple):
    """One packed row: `tokens` [L], `segment_lengths` [documents], their sum at most L.

    `loss_mask` [L] marks the tokens that the model is to learn to produce; None means all.
    """

    tokens: np.ndarray
    segment_lengths: np.ndarray
    loss_mask: np.ndarray | None = None


@dataclass
class DocumentCounts:
    """Counted while rows are made: documents and the bytes of their text (UTF-8)."""

    documents: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the directory, rows, size and checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory of rows holds. `tokens` does not count padding."""

    source: str
    sequence_length: int
    vocab_size: int
    tokenizer_hash: str
    dtype: str
    has_loss_mask: bool
    documents: int
    text_bytes: int
    tokens: int
    rows: int
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


def decode_row(record: bytes, dtype: np.dtype, sequence_length: int, has_loss_mask: bool) -> Row:
    """The row of `record`; arrays are read-only views where they can be."""
    tokens = np.frombuffer(record, dtype, sequence_length)
    offset = tokens.nbytes
    mask = None
    if has_loss_mask:
        bits = np.frombuffer(record, np.uint8, -(-sequence_length // 8), offset)
        offset += bits.nbytes
        mask = np.unpackbits(bits, count=sequence_length).astype(bool)
    return Row(tokens, np.frombuffer(record, "<u4", offset=offset), mask)


def write_rows(
    directory: str | os.PathLike,
    rows: Iterable[Row],
    *,
    sequence_length: int,
    vocab_size: int,
    tokenizer_hash: str,
    source: str,
    counts: DocumentCounts,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Writes `rows` and their manifest as the new `directory`.

    `counts` is read when `rows` is exhausted, so whoever makes the rows fills it meanwhile.
    Raises ConfigError if the directory exists, if there is no row, or if a token id does not
    fit the vocabulary.
    """
    directory = Path(directory)
    if directory.exists():
        raise ConfigError(f"{directory} exists already: remove it or choose another directory.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        rows_per_shard = max(1, shard_tokens // sequence_length)
        writer = _ShardWriter(temporary, token_dtype(vocab_size), rows_per_shard)
        tokens, has_loss_mask = 0, False
        for index, row in enumerate(rows):
            has_loss_mask = _check_row(row, index, sequence_length, vocab_size, has_loss_mask)
            writer.write(row)
            tokens += int(row.segment_lengths.sum())
        shards = writer.close()
        if not shards:
            raise ConfigError(
                f"{directory}: there is nothing to write: no document of this split has any text."
            )
        manifest = Manifest(
            source=source,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            tokenizer_hash=tokenizer_hash,
            dtype=token_dtype(vocab_size).name,
            has_loss_mask=has_loss_mask,
            documents=counts.documents,
            text_bytes=counts.text_bytes,
            tokens=tokens,
            rows=sum(shard.rows for shard in shards),
            shards=shards,
        )
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
        (temporary / MANIFEST).write_text(text + "\n")
        temporary.chmod(0o755)  # mkdtemp makes it 0700; data are for all who may read the parent
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return manifest


def _check_row(row: Row, index: int, length: int, vocab_size: int, has_loss_mask: bool) -> bool:
    """Whether rows have masks (the first row decides); raises if `row` cannot be stored."""
    if index and has_loss_mask != (row.loss_mask is not None):
        raise ValueError(f"row {index}: all rows of a directory have a loss mask, or none has")
    if row.tokens.shape != (length,):
        raise ValueError(f"row {index}: shape {row.tokens.shape}, expected ({length},)")
    highest = int(row.tokens.max())
    if highest >= vocab_size:
        raise ConfigError(
            f"row {index}: token id {highest} is beyond the vocabulary of {vocab_size} entries."
        )
    return row.loss_mask is not None


class _ShardWriter:
    """Rows into numbered shards of at most `rows_per_shard` rows."""

    def __init__(self, directory: Path, dtype: np.dtype, rows_per_shard: int):
        self._directory, self._dtype, self._rows_per_shard = directory, dtype, rows_per_shard
        self._shards: list[Shard] = []
        self._writer: ArrayRecordWriter | None = None
        self._rows = 0

    def write(self, row: Row) -> None:
        # group_size 1: each row can be read alone, which random access needs.
        writer = self._writer or ArrayRecordWriter(str(self._path()), "group_size:1")
        writer.write(encode_row(row, self._dtype))
        self._writer = writer
        self._rows += 1
        if self._rows == self._rows_per_shard:
            self._finish_shard()

    def close(self) -> tuple[Shard, ...]:
        if self._writer is not None:
            self._finish_shard()
        return tuple(self._shards)

    def _path(self) -> Path:
        return self._directory / f"rows-{len(self._shards):05d}.array_record"

    def _finish_shard(self) -> None:
        assert self._writer is not None
        self._writer.close()
        path = self._path()
        self._shards.append(Shard(path.name, self._rows, path.stat().st_size, file_sha256(path)))
        self._writer, self._rows = None, 0


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowSource:
    """Random access to the rows of a directory; a source for `grain.MapDataset.source`."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._dtype = token_dtype(manifest.vocab_size)
        # The rows of each shard are given, so that no shard is opened before it is read.
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{directory / shard.name}[0:{shard.rows}]" for shard in manifest.shards]
        )

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Row:
        manifest = self.manifest
        record = self._records[index]
        return decode_row(record, self._dtype, manifest.sequence_length, manifest.has_loss_mask)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of a directory of rows; ConfigError if there is none or it is not ours."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such directory of prepared rows.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f'"format" is not {FORMAT!r}')
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        return Manifest(shards=shards, **fields)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a readable manifest of prepared rows ({error}). "
            "Prepare the data again with `ouro data prepare`."
        ) from error


def open_rows(directory: str | os.PathLike) -> RowSource:
    """Opens a directory that `write_rows` made.

    Raises ConfigError if the directory, its manifest or a shard is missing or cut short; contents
    are checked by `verify_rows` only.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for shard in manifest.shards:
        path = directory / shard.name
        if not path.is_file():
            raise ConfigError(f"{path}: this shard of the manifest is missing.")
        if path.stat().st_size != shard.bytes:
            raise ConfigError(
                f"{path}: {path.stat().st_size:,} bytes, the manifest says {shard.bytes:,}. "
                "The shard was cut short or changed; copy or prepare it again."
            )
    return RowSource(directory, manifest)


def verify_rows(directory: str | os.PathLike) -> Manifest:
    """Reads everything: checksums, lengths, token ids, counts. ConfigError names the shard."""
    source = open_rows(directory)
    manifest = source.manifest
    for shard in manifest.shards:
        path = source.directory / shard.name
        if file_sha256(path) != shard.sha256:
            raise ConfigError(f"{path}: the checksum differs from the manifest's.")
    tokens = 0
    for index, row in enumerate(source):
        length = int(row.segment_lengths.sum())
        if length > manifest.sequence_length or int(row.tokens.max()) >= manifest.vocab_size:
            raise ConfigError(
                f"{source.directory}: row {index} does not fit the manifest: {length} tokens, "
                f"highest id {int(row.tokens.max())}."
            )
        tokens += length
    if tokens != manifest.tokens:
        raise ConfigError(
            f"{source.directory}: {tokens:,} tokens, the manifest says {manifest.tokens:,}."
        )
    return manifest
